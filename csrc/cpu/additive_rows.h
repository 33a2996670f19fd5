// What both directions of additive attention share: rows of keys and values, taken CHUNK numbers at a time.
#pragma once

#include "additive.h"
#include "ahead.h"
#include "numeric.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr int64_t CHUNK = 64;

// A chunk in the type of the arithmetic: where it lies, or converted into buffer. Asks for that `ahead` bytes further on,
// by default a page of memory: at its end the hardware stops asking.
template <class S, class R>
RECATTN_FN const R* chunk(const S* from, R* buffer, int64_t n, int64_t ahead = 4096) {
  fetch(reinterpret_cast<const char*>(from) + ahead, n * sizeof(S));
  if constexpr (sizeof(S) == sizeof(R)) {
    return from;
  } else {
    widen(buffer, from, n);
    return buffer;
  }
}

// Calls work(first, count) for every chunk of 0..width; for all but the last, count is a constant to the compiler.
template <class F>
RECATTN_FN void each_chunk(int64_t width, F work) {
  int64_t i = 0;
  for (; i + CHUNK <= width; i += CHUNK) work(i, std::integral_constant<int64_t, CHUNK>());
  if (i < width) work(i, width - i);
}

// The sum of CHUNK partial sums, which are lost.
template <class R>
RECATTN_FN R total(R* sums) {
  for (int64_t half = CHUNK / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

inline bool kept(const Additive& p, int64_t b, int64_t n) {
  return p.mask == nullptr || p.mask[b * p.mask_stride_b + n * p.mask_stride_n] != 0;
}

template <class S>
RECATTN_FN const S* row(const Positions& x, int64_t b, int64_t n) {
  return static_cast<const S*>(x.data) + b * x.stride_b + n * x.stride_n;
}

// f.operator()<S, R>() for an S of keys or of values.
template <class F>
void by_dtype(const Additive& p, const Positions& x, F f) {
  if (p.wide) return f.template operator()<double, double>();
  switch (x.dtype) {
    case Dtype::bfloat16: return f.template operator()<BFloat16, float>();
    case Dtype::float16: return f.template operator()<Float16, float>();
    default: return f.template operator()<float, float>();
  }
}

// f.operator()<Activation, S, R>() for the keys.
template <class F>
void by_activation(const Additive& p, F f) {
  by_dtype(p, p.keys, [&]<class S, class R>() {
    p.activation == Activation::tanh ? f.template operator()<Activation::tanh, S, R>()
                                     : f.template operator()<Activation::relu, S, R>();
  });
}

// The threads that a pass over so many numbers is worth.
inline int threads_for(const Additive& p, int64_t numbers) { return numbers < 16384 ? 1 : p.threads; }

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
