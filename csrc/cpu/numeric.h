// The element types of the CPU kernels: how each is loaded into, and stored from, the type it is computed in.
// Written with integer arithmetic and no branch, so that loops over it vectorise on any instruction set.
#pragma once

#include "../cells.h"

namespace recattn {
namespace RECATTN_ISA {

struct BFloat16 {
  uint16_t bits;
  static constexpr float smallest() { return 1e-38f; }  // float32's own range: nothing positive rounds to 0 above it
  static constexpr float below(float bound) { return bound == 6.0f ? 5.96875f : 0.99609375f; }
};

struct Float16 {
  uint16_t bits;
  static constexpr float smallest() { return 5.9604644775390625e-8f; }  // 2^-24
  static constexpr float below(float bound) { return bound == 6.0f ? 5.99609375f : 0.99951171875f; }
};

template <class S> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };

RECATTN_FN float load(float v) { return v; }
RECATTN_FN double load(double v) { return v; }
RECATTN_FN float load(BFloat16 v) { return bits_to_float(uint32_t(v.bits) << 16); }

RECATTN_FN float load(Float16 v) {
  const uint32_t magnitude = v.bits & 0x7fffu, sign = uint32_t(v.bits & 0x8000u) << 16;
  // Shifted into place the exponent is short by 112, subnormals included; 2^112 mends both.
  const uint32_t finite = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity and NaN
  return bits_to_float(sign | (magnitude >= 0x7c00u ? special : finite));
}

RECATTN_FN void store(float* to, float v) { *to = v; }
RECATTN_FN void store(double* to, double v) { *to = v; }

// Both 16-bit stores round to nearest, ties to even.
RECATTN_FN void store(BFloat16* to, float v) {
  const uint32_t bits = float_to_bits(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = uint16_t(nan ? 0x7fc0u : rounded);
}

RECATTN_FN void store(Float16* to, float v) {
  const uint32_t bits = float_to_bits(v), a = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14: next to 0.5 a float's last bit is worth 2^-24, so the addition itself rounds to a subnormal half.
  const uint32_t small = float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000u;
  const uint32_t large = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t magnitude = a < 0x38800000u ? small : (a < 0x47800000u ? normal : large);
  to->bits = uint16_t(sign | magnitude);
}

// A stored hidden state: see keep_inside in cells.h.
template <Activation A, class S>
RECATTN_FN void store_state(S* to, typename Compute<S>::type h) {
  if constexpr (sizeof(S) == 2) h = keep_inside<A, S>(h);
  store(to, h);
}

}  // namespace RECATTN_ISA
}  // namespace recattn
