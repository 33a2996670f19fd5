// The element types of the CPU kernels: how each is loaded into, and stored from, the type it is computed in.
// Written with integer arithmetic and no branch, so that loops over it vectorise on any instruction set.
#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <type_traits>

#include "../cells.h"

namespace recattn {
namespace RECATTN_ISA {

struct BFloat16 : BFloat16Limits {
  uint16_t bits;
};

struct Float16 : Float16Limits {
  uint16_t bits;
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

#ifdef __AVX512F__
// GCC 12 warns of what the intrinsics without a mask leave undefined.
constexpr __mmask16 ALL = 0xffff;

// Sixteen floats rounded as store() rounds one, in the upper halves of their words.
RECATTN_FN __m512i bfloat16_bits(const float* from) {
  const __m512 v = _mm512_loadu_ps(from);
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(ALL, bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the scalar tails below for loops that never end.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Waggressive-loop-optimizations"
#endif

// n elements at once, for loops that compute in R. In a loop with other arithmetic compilers vectorise the conversions
// badly or, for Float16, not at all.
template <class S>
RECATTN_FN void widen(float* __restrict to, const S* __restrict from, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<S, Float16>) {
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      _mm512_storeu_ps(to + i, _mm512_maskz_cvtph_ps(ALL, half));
    }
#endif
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
  }
#endif
  for (; i < n; ++i) to[i] = load(from[i]);
}

template <class S>
RECATTN_FN void narrow(S* __restrict to, const float* __restrict from, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<S, Float16>) {
#ifdef __AVX512F__
    for (; i + 16 <= n; i += 16) {
      const __m256i half = _mm512_maskz_cvtps_ph(ALL, _mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), half);
    }
#endif
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
    }
  }
#endif
#ifdef __AVX512BW__
  if constexpr (std::is_same_v<S, BFloat16>) {
    alignas(64) static constexpr uint16_t UPPER[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i upper = _mm512_load_si512(UPPER);
    for (; i + 32 <= n; i += 32) {
      const __m512i halves = _mm512_permutex2var_epi16(bfloat16_bits(from + i), upper, bfloat16_bits(from + i + 16));
      _mm512_storeu_si512(to + i, halves);
    }
  }
#endif
  for (; i < n; ++i) store(to + i, from[i]);
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

}  // namespace RECATTN_ISA
}  // namespace recattn
