// Of CUDA's header of this name what csrc/cuda/values.cuh uses.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023;
  float v = exponent == 31 ? (mantissa ? NAN : INFINITY)
                           : std::ldexp(float(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
  return h.bits & 0x8000 ? -v : v;
}

inline __half __float2half_rn(float v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  const float size = std::fabs(v);
  if (v != v) return {0x7fff};
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(size, &exponent);  // size = m 2^exponent with m in [1/2, 1)
  const int unit = exponent - 11 > -24 ? exponent - 11 : -24;
  const uint16_t mantissa = uint16_t(std::nearbyint(std::ldexp(size, -unit)));  // to even, with 2^11 for the next unit
  return {uint16_t(sign | (mantissa + (mantissa >= 1024 ? (unit + 24) * 1024 : 0)))};
}

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half v) { return v.bits; }
