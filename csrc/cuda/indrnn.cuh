// What the kernels of IndRNN share: which columns a thread has, and the choice of an instantiation.
#pragma once

#include <initializer_list>

#include "launch.cuh"
#include "stream.cuh"

namespace recattn {
namespace RECATTN_ISA {

// What both directions know about a thread's columns. GATED: there are resets or lengths.
template <class E, bool GATED>
struct Columns {
  static constexpr int N = E::COLUMNS;
  int64_t first, b, h, length;
  float u[N];

  __device__ explicit Columns(const Indrnn& p) : first((int64_t(blockIdx.x) * THREADS + threadIdx.x) * N) {
    if (!exist(p)) return;
    b = first / p.H;
    h = first % p.H;
    for (int j = 0; j < N; ++j) u[j] = load(p.weight_hh, h + j);
    length = p.T;
    if (GATED && p.lengths) length = p.lengths[b] < 0 ? 0 : (p.lengths[b] > p.T ? p.T : p.lengths[b]);
  }
  __device__ bool exist(const Indrnn& p) const { return first < p.B * p.H; }
  __device__ void none() {
    b = h = length = 0;
    for (int j = 0; j < N; ++j) u[j] = 0.0f;
  }

  __device__ Walk<typename E::Word> walk(const Indrnn& p, const Sequence& s, bool backwards) const {
    return {s.data, b * s.stride_b + h, s.stride_t, int64_t(sizeof(typename E::Word)) / N, p.T, backwards};
  }
  __device__ Walk<uint8_t> reset_walk(const Indrnn& p, bool backwards) const {
    uint8_t* data = GATED ? const_cast<uint8_t*>(p.reset) : nullptr;
    return {data, b * p.reset_stride_b, p.reset_stride_t, 1, p.T, backwards};
  }
  // A row's resets are few bytes that its columns share through the cache: plain loads, a chunk ahead.
  __device__ Stream<uint8_t, false, true> resets(const Indrnn& p, bool backwards) const {
    return {reset_walk(p, backwards), p.T, nullptr, 1};
  }
};

// True where every pair of columns (2i, 2i + 1) is one aligned word.
inline bool paired(const Indrnn& p, std::initializer_list<const Sequence*> sequences) {
  bool even = p.H % 2 == 0;
  for (const Sequence* s : sequences) {
    even = even && reinterpret_cast<uintptr_t>(s->data) % 4 == 0 && s->stride_t % 2 == 0 && s->stride_b % 2 == 0;
  }
  return even;
}

template <class E, class F>
void by_activation(Activation a, F f) {
  switch (a) {
    case Activation::relu: return f.template operator()<E, Activation::relu>();
    case Activation::tanh: return f.template operator()<E, Activation::tanh>();
    case Activation::sigmoid: return f.template operator()<E, Activation::sigmoid>();
    case Activation::identity: return f.template operator()<E, Activation::identity>();
    case Activation::leaky_relu: return f.template operator()<E, Activation::leaky_relu>();
    case Activation::relu6: return f.template operator()<E, Activation::relu6>();
    case Activation::hardtanh: return f.template operator()<E, Activation::hardtanh>();
  }
}

template <class F>
void by_element(const Indrnn& p, bool pairs, F f) {
  switch (p.dtype) {
    case Dtype::float32: return by_activation<One32>(p.activation, f);
    case Dtype::bfloat16:
      return pairs ? by_activation<Two16<BFloat16>>(p.activation, f) : by_activation<One16<BFloat16>>(p.activation, f);
    case Dtype::float16:
      return pairs ? by_activation<Two16<Float16>>(p.activation, f) : by_activation<One16<Float16>>(p.activation, f);
  }
}

}  // namespace RECATTN_ISA
}  // namespace recattn
