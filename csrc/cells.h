// The arithmetic of the cells, forward and backward, shared by csrc/cpu and csrc/cuda.
//
// A CPU source is compiled once per instruction set, each time inside its own namespace (RECATTN_ISA), so that the
// linker cannot hand AVX-512 code to a machine without it. Everything here lives in that namespace for the same reason.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef RECATTN_ISA
#define RECATTN_ISA isa_device
#endif

#ifdef __CUDACC__
#define RECATTN_FN __host__ __device__ __forceinline__
#else
#define RECATTN_FN inline __attribute__((always_inline))
#endif

namespace recattn {

// The order is that of ACTIVATIONS in recattn_kernels/ops/indrnn/contract.py.
enum class Activation : int { relu, tanh, sigmoid, identity, leaky_relu, relu6, hardtanh };

namespace RECATTN_ISA {

RECATTN_FN float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

RECATTN_FN uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// x = n ln 2 + r with |r| <= ln(2)/2. Adding 1.5 * 2^23 rounds to an integer: n is held in the low bits of the sum,
// which is returned. V: float, or a vector of floats.
template <class V>
RECATTN_FN V split_by_ln2(V x, V& r) {
  const V shifted = x * 1.44269504088896341f + 12582912.0f;
  const V n = shifted - 12582912.0f;
  r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  return shifted;
}

// (exp(r) - 1 - r) / r^2 by Taylor's series: its next term makes less than 6e-9 of exp(r) for |r| <= ln(2)/2.
template <class V>
RECATTN_FN V exp_series(V r) {
  V p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  return p * r + 0.5f;
}

// What exp, sigmoid and tanh ask of a type: of float and double, and in csrc/cpu of vectors of them.
template <class V>
struct Numbers;

// exp(x) to about 1 ulp on [-87, 88.3], infinity above, at least 1e-38 below: enough for sigmoid and tanh, and written
// without a branch or a libm call so that a loop over it vectorises. NaN stays NaN. V: float, or a vector of floats.
template <class V>
RECATTN_FN V exp_by_series(V x) {
  x = Numbers<V>::at_least(Numbers<V>::at_most(x, 89.0f), -87.0f);
  V r;
  const V shifted = split_by_ln2(x, r);
  V p = exp_series(r);
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * Numbers<V>::power_of_2(shifted);
}

// tanh(x) = e / (e + 2) with e = exp(2x) - 1, of which a 1 is never taken near 0: with 2x = n ln 2 + r as above, e is
// 2^n (exp(r) - 1) + (2^n - 1). From |2x| = 18.3 on the quotient is 1.
template <class V>
RECATTN_FN V tanh_by_series(V x) {
  const V a = Numbers<V>::at_least(Numbers<V>::at_most(x + x, 18.3f), -18.3f);
  V r;
  const V shifted = split_by_ln2(a, r);
  const V p = exp_series(r) * r * r + r;
  const V scale = Numbers<V>::power_of_2(shifted);
  const V e = p * scale + (scale - 1.0f);
  return e / (e + 2.0f);
}

template <>
struct Numbers<float> {
  // The bound, where x is beyond it. NaN stays NaN.
  static RECATTN_FN float at_most(float x, float bound) { return x > bound ? bound : x; }
  static RECATTN_FN float at_least(float x, float bound) { return x < bound ? bound : x; }
  // 2^n of what split_by_ln2 returns.
  static RECATTN_FN float power_of_2(float shifted) { return bits_to_float((float_to_bits(shifted) + 127u) << 23); }
#ifdef __CUDA_ARCH__
  static RECATTN_FN float exp(float x) { return ::expf(x); }
  static RECATTN_FN float tanh(float x) { return ::tanhf(x); }
#else
  static RECATTN_FN float exp(float x) { return exp_by_series(x); }
  static RECATTN_FN float tanh(float x) { return tanh_by_series(x); }
#endif
};

template <>
struct Numbers<double> {
  static RECATTN_FN double exp(double x) { return ::exp(x); }
  static RECATTN_FN double tanh(double x) { return ::tanh(x); }
};

template <class V>
RECATTN_FN V exp_(V x) {
  return Numbers<V>::exp(x);
}
template <class V>
RECATTN_FN V sigmoid(V x) {
  return 1.0f / (1.0f + exp_(-x));
}
template <class V>
RECATTN_FN V tanh_(V x) {
  return Numbers<V>::tanh(x);
}

// h = act(v). Comparisons are written so that NaN passes through every one of them, as in torch.
template <Activation A, class R>
RECATTN_FN R activate(R v, R slope) {
  if constexpr (A == Activation::relu) return v < R(0) ? R(0) : v;  // one instruction: NaN passes through that maximum
  if constexpr (A == Activation::tanh) return tanh_(v);
  if constexpr (A == Activation::sigmoid) return sigmoid(v);
  if constexpr (A == Activation::leaky_relu) return v > R(0) ? v : v * slope;
  if constexpr (A == Activation::relu6) {
    const R low = v <= R(0) ? R(0) : v;
    return low >= R(6) ? R(6) : low;
  }
  if constexpr (A == Activation::hardtanh) {
    const R low = v <= R(-1) ? R(-1) : v;
    return low >= R(1) ? R(1) : low;
  }
  return v;  // identity
}

// act'(v) from h = act(v) alone, so that the pre-activation need not be kept.
template <Activation A, class R>
RECATTN_FN R derivative(R h, R slope) {
  if constexpr (A == Activation::relu) return h <= R(0) ? R(0) : R(1);
  if constexpr (A == Activation::tanh) return R(1) - h * h;
  if constexpr (A == Activation::sigmoid) return h * (R(1) - h);
  if constexpr (A == Activation::leaky_relu) return h > R(0) ? R(1) : slope;
  // Two selects, not one on (a || b), which compilers turn into a branch and then do not vectorise.
  if constexpr (A == Activation::relu6) return h <= R(0) ? R(0) : (h >= R(6) ? R(0) : R(1));
  if constexpr (A == Activation::hardtanh) return h <= R(-1) ? R(0) : (h >= R(1) ? R(0) : R(1));
  return R(1);  // identity
}

// g * d with such a derivative d. What a mask takes out is 0, whatever it was: of an infinity the product would be NaN.
template <Activation A, class R>
RECATTN_FN R times_derivative(R g, R d) {
  constexpr bool MASK = A == Activation::relu || A == Activation::relu6 || A == Activation::hardtanh;
  if constexpr (MASK) return d == R(0) ? R(0) : g;
  return g * d;
}

// Of the 16-bit types: about the least positive number, and the neighbour towards 0 of a bound, 1 or 6.
struct BFloat16Limits {
  static constexpr float smallest() { return 1e-38f; }  // float32's own range: nothing positive rounds to 0 above it
  static constexpr float below(float bound) { return bound == 6.0f ? 5.96875f : 0.99609375f; }
};

struct Float16Limits {
  static constexpr float smallest() { return 5.9604644775390625e-8f; }  // 2^-24
  static constexpr float below(float bound) { return bound == 6.0f ? 5.99609375f : 0.99951171875f; }
};

// What a 16-bit type S stores for h. Rounding may not carry h onto a bound of the activation: the derivative, which is
// read off the stored value, would then be 0 where it is 1.
template <Activation A, class S, class R>
RECATTN_FN R keep_inside(R h) {
  if constexpr (A == Activation::relu || A == Activation::leaky_relu || A == Activation::relu6) {
    const R least = S::smallest();
    h = h > R(0) ? (h < least ? least : h) : h;
  }
  if constexpr (A == Activation::relu6 || A == Activation::hardtanh) {
    const R bound = A == Activation::relu6 ? R(6) : R(1), inner = S::below(bound);
    h = h < bound ? (h > inner ? inner : h) : h;
  }
  if constexpr (A == Activation::hardtanh) {
    const R inner = -S::below(R(1));
    h = h > R(-1) ? (h < inner ? inner : h) : h;
  }
  return h;
}

// max(min(v, limit), -limit), NaN kept; a limit of infinity changes nothing.
template <class R>
RECATTN_FN R clamp_symmetric(R v, R limit) {
  v = v > limit ? limit : v;
  return v < -limit ? -limit : v;
}

// a * (1 - a), the derivative of a sigmoid whose value is a, and 1 - a * a, that of a tanh.
template <class R>
RECATTN_FN R sigmoid_slope(R a) {
  return a * (1.0f - a);
}
template <class R>
RECATTN_FN R tanh_slope(R a) {
  return 1.0f - a * a;
}

// The gates of the lstm (activated), or the gradients of what they are activated from.
template <class R>
struct LstmGates {
  R i, f, g, o;
};

template <class R>
RECATTN_FN LstmGates<R> lstm_gates(R i, R f, R g, R o) {
  return {sigmoid(i), sigmoid(f), tanh_(g), sigmoid(o)};
}

// c[t] = f * c[t-1] + i * g
template <class R>
RECATTN_FN R lstm_cell(const LstmGates<R>& a, R c) {
  return a.f * c + a.i * a.g;
}

// From dc = dL/dc[t] and, where h = o * squashed, dh = dL/dh[t]. The cell's own gradient is dL/dc[t-1] = f * dc.
template <class R>
RECATTN_FN LstmGates<R> lstm_backward(const LstmGates<R>& a, R c, R squashed, R dc, R dh) {
  return {dc * a.g * sigmoid_slope(a.i), dc * c * sigmoid_slope(a.f), dc * a.i * tanh_slope(a.g),
          dh * squashed * sigmoid_slope(a.o)};
}

// h[t] = (1 - z) * n + z * h[t-1], the gru's.
template <class R>
RECATTN_FN R gru_state(R z, R n, R h) {
  return (1.0f - z) * n + z * h;
}

// From dh = dL/dh[t]: the gradients of what z and n are activated from. Through z alone, dL/dh[t-1] = z * dh.
template <class R>
RECATTN_FN R gru_backward_z(R z, R n, R h, R dh) {
  return dh * (h - n) * sigmoid_slope(z);
}
template <class R>
RECATTN_FN R gru_backward_n(R z, R n, R dh) {
  return dh * (1.0f - z) * tanh_slope(n);
}

}  // namespace RECATTN_ISA
}  // namespace recattn
