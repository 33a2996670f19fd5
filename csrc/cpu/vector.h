// The widest vectors of an instruction set.
#pragma once

#include "numeric.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class R> struct Vector {
  typedef R type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class R> using Vec = typename Vector<R>::type;
template <class R> constexpr int LANES = VECTOR_BYTES / sizeof(R);

// At any address.
template <class R>
RECATTN_FN Vec<R> load_vector(const R* from) {
  Vec<R> v;
  memcpy(&v, from, VECTOR_BYTES);
  return v;
}
template <class R>
RECATTN_FN void store_vector(R* to, const Vec<R>& v) {
  memcpy(to, &v, VECTOR_BYTES);
}

}  // namespace

template <>
struct Numbers<Vec<float>> {
  using V = Vec<float>;
  typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));

  // The instructions give their second operand where one is NaN. Of a comparison compilers make two.
  static RECATTN_FN V at_most(V x, float bound) {
#if defined(__AVX512F__)
    return (V)_mm512_maskz_min_ps(ALL, (__m512)(V{} + bound), (__m512)x);
#elif defined(__AVX__)
    return (V)_mm256_min_ps((__m256)(V{} + bound), (__m256)x);
#elif defined(__SSE2__)
    return (V)_mm_min_ps((__m128)(V{} + bound), (__m128)x);
#else
    return x > bound ? V{} + bound : x;
#endif
  }
  static RECATTN_FN V at_least(V x, float bound) {
#if defined(__AVX512F__)
    return (V)_mm512_maskz_max_ps(ALL, (__m512)(V{} + bound), (__m512)x);
#elif defined(__AVX__)
    return (V)_mm256_max_ps((__m256)(V{} + bound), (__m256)x);
#elif defined(__SSE2__)
    return (V)_mm_max_ps((__m128)(V{} + bound), (__m128)x);
#else
    return x < bound ? V{} + bound : x;
#endif
  }
  static RECATTN_FN V power_of_2(V shifted) {
    Bits bits;
    memcpy(&bits, &shifted, VECTOR_BYTES);
    bits = (bits + 127u) << 23;
    V power;
    memcpy(&power, &bits, VECTOR_BYTES);
    return power;
  }
  static RECATTN_FN V exp(V x) { return exp_by_series(x); }
  static RECATTN_FN V tanh(V x) { return tanh_by_series(x); }
};

template <>
struct Numbers<Vec<double>> {
  using V = Vec<double>;
  static RECATTN_FN V exp(V x) {
    for (int i = 0; i < LANES<double>; ++i) x[i] = ::exp(x[i]);
    return x;
  }
  static RECATTN_FN V tanh(V x) {
    for (int i = 0; i < LANES<double>; ++i) x[i] = ::tanh(x[i]);
    return x;
  }
};

namespace {

// n elements, of which there may be fewer than a vector has.
template <class R>
RECATTN_FN Vec<R> load_part(const R* from, int64_t n) {
  if (n >= LANES<R>) return load_vector(from);
  Vec<R> v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = from[i];
  return v;
}
template <class R>
RECATTN_FN void store_part(R* to, const Vec<R>& v, int64_t n) {
  if (n >= LANES<R>) return store_vector(to, v);
  for (int64_t i = 0; i < n; ++i) to[i] = v[i];
}

// Elements i and on of rows of n: a vector, or what is left.
template <class R>
struct Lanes {
  int64_t i, n;

  RECATTN_FN Vec<R> load(const R* from) const { return load_part(from + i, n - i); }
  RECATTN_FN void store(R* to, const Vec<R>& v) const { store_part(to + i, v, n - i); }
};

[[maybe_unused]] inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
[[maybe_unused]] inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
