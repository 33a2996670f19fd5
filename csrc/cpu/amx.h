// Products of float32 on units that multiply tiles of bfloat16 (Intel AMX), as precise as float32's own.
//
// A float is the sum of three bfloat16, each at most half a unit in the last place of the one before (Henry, Tang and
// Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019). Of the
// nine products of two such sums the six are taken that may count in a float32; they are exact, and added in float32.
// Factors from LARGE on, infinite and NaN ones too, have no such parts, or sums that may overflow: split() says so, and
// its caller multiplies them as floats. A part below 2^-126 counts as zero. Of a right factor that is of bfloat16 in
// the first place, as a model's 16-bit weights are, the first parts are all, and three products are left.
#pragma once

#include "ahead.h"
#include "isa.h"
#include "tile.h"

#if defined(RECATTN_HAS_AMX) && defined(__AVX512F__)
#define RECATTN_AMX __attribute__((target("avx512bf16")))
#endif

namespace recattn {
namespace RECATTN_ISA {
namespace {

typedef uint16_t Bits;  // of a bfloat16

// A tile has 16 rows of 32 elements along k; a block the tiles of the three parts. A left factor is blocks of 16 rows,
// [k / 32][part][row][k % 32], a right one of 16 columns, [k / 32][part][k % 32 / 2][column][k % 2].
constexpr int64_t TILE_ROWS = 16, TILE_DEPTH = 32, TILE = TILE_ROWS * TILE_DEPTH, PARTS = 3, BLOCK = PARTS * TILE;

// How many parts a factor takes: all of them, 1 where the others are zero, 0 where an element has none. Of two factors:
constexpr int parts_of_both(int a, int b) { return a == 0 || b == 0 ? 0 : a > b ? a : b; }

[[maybe_unused]] inline int64_t strip_size(int64_t K) { return ceil_div(K, TILE_DEPTH) * BLOCK; }

// Below this many rows their tiles would be more padding than rows.
constexpr int64_t LEAST_TILE_ROWS = 8;

#ifdef RECATTN_AMX

template <class R>
bool has_tiles() {
  return std::is_same_v<R, float> && isa::current() == isa::AMX;
}

// Where the tiles are in use on a thread.
class TileUnits {
 public:
  TileUnits() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64);
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  TileUnits(const TileUnits&) = delete;
  ~TileUnits() { asm volatile("tilerelease"); }
};

constexpr uint32_t LARGE = (127 + 55) << 23;  // 2^55, as bits

// What has been seen of a factor: an element that is LARGE, a second part.
struct Seen {
  __mmask16 large = 0, second = 0;
  int parts() const { return large ? 0 : second ? PARTS : 1; }
};

// The parts of 32 floats.
RECATTN_AMX RECATTN_FN void split(__m512 first, __m512 second, __m512i* parts, Seen& seen) {
  const auto is_large = [](__m512 v) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    return _mm512_cmpge_epu32_mask(magnitude, _mm512_set1_epi32(LARGE));
  };
  seen.large |= is_large(first) | is_large(second);
#pragma GCC unroll 3
  for (int i = 0; i < PARTS; ++i) {
    parts[i] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    const __m512i low = _mm512_maskz_cvtepu16_epi32(ALL, _mm512_maskz_extracti64x4_epi64(0xf, parts[i], 0));
    const __m512i high = _mm512_maskz_cvtepu16_epi32(ALL, _mm512_maskz_extracti64x4_epi64(0xf, parts[i], 1));
    first -= (__m512)_mm512_maskz_slli_epi32(ALL, low, 16);
    second -= (__m512)_mm512_maskz_slli_epi32(ALL, high, 16);
  }
  seen.second |= _mm512_test_epi32_mask(parts[1], parts[1]);
}

// Stores the parts of 32 neighbours, of which n exist, a tile apart.
RECATTN_AMX RECATTN_FN void split_row(const float* from, int64_t n, Bits* to, Seen& seen) {
  const uint32_t mask = n < TILE_DEPTH ? (uint32_t(1) << n) - 1 : UINT32_MAX;
  __m512i parts[PARTS];
  split(_mm512_maskz_loadu_ps(__mmask16(mask), from), _mm512_maskz_loadu_ps(__mmask16(mask >> 16), from + 16), parts,
        seen);
  for (int p = 0; p < PARTS; ++p) _mm512_store_si512(to + p * TILE, parts[p]);
}

// n of the 16 rows (of a right factor: columns) of a factor, from neighbours along k. Returns how many parts they take.
template <bool RIGHT>
RECATTN_AMX int split_along(const float* const* rows, int64_t n, int64_t K, Bits* to) {
  const int64_t depth = ceil_div(K, TILE_DEPTH);
  Seen seen;
  if constexpr (!RIGHT) {
    constexpr int64_t AT_ONCE = 4;  // blocks, which stay in the first-level cache
    for (int64_t k0 = 0; k0 < depth; k0 += AT_ONCE) {
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t k = k0; k < least(depth, k0 + AT_ONCE); ++k) {
          const float* from = rows[i] + k * TILE_DEPTH;
          fetch(from + AT_ONCE * TILE_DEPTH, TILE_DEPTH * sizeof(float));
          split_row(from, K - k * TILE_DEPTH, to + k * BLOCK + i * TILE_DEPTH, seen);
        }
      }
    }
    for (int64_t p = 0; p < depth * PARTS; ++p) memset(to + p * TILE + n * TILE_DEPTH, 0, (TILE_ROWS - n) * 64);
    return seen.parts();
  }
  alignas(64) Bits tiles[BLOCK] = {};
  for (int64_t k = 0; k < depth; ++k, to += BLOCK) {
    for (int64_t i = 0; i < n; ++i) {
      split_row(rows[i] + k * TILE_DEPTH, K - k * TILE_DEPTH, tiles + i * TILE_DEPTH, seen);
    }
    for (int p = 0; p < PARTS; ++p) {  // pairs along k are elements of 32 bits
      const float* pairs[TILE_ROWS];
      for (int64_t i = 0; i < TILE_ROWS; ++i) pairs[i] = reinterpret_cast<float*>(tiles + p * TILE + i * TILE_DEPTH);
      transpose_square(pairs, reinterpret_cast<float*>(to + p * TILE), TILE_ROWS);
    }
  }
  return seen.parts();
}

// The same from neighbours across: rows (columns) i of them at from + k * stride + i.
template <bool RIGHT>
RECATTN_AMX int split_across(const float* from, int64_t stride, int64_t n, int64_t K, Bits* to) {
  alignas(64) static constexpr uint16_t PAIRS[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_load_si512(PAIRS);
  const __mmask16 columns = __mmask16((uint32_t(1) << least(n, 16)) - 1);
  alignas(64) Bits tiles[BLOCK];
  constexpr int64_t AHEAD = 2 * TILE_DEPTH;  // lines too far apart for the hardware to foresee
  Seen seen;
  for (int64_t k = 0; k < K; k += TILE_DEPTH, to += BLOCK) {
    Bits* const block = RIGHT ? to : tiles;
    for (int64_t i = 0; i < TILE_ROWS; ++i) {
      __m512i parts[PARTS] = {};
      if (k + 2 * i < K) {
        const float* row = from + (k + 2 * i) * stride;
        __builtin_prefetch(row + AHEAD * stride), __builtin_prefetch(row + (AHEAD + 1) * stride);
        const __mmask16 next = k + 2 * i + 1 < K ? columns : __mmask16(0);
        split(_mm512_maskz_loadu_ps(columns, row), _mm512_maskz_loadu_ps(next, next ? row + stride : row), parts,
              seen);
      }
      for (int p = 0; p < PARTS; ++p) {
        _mm512_store_si512(block + p * TILE + i * TILE_DEPTH, _mm512_maskz_permutexvar_epi16(~0u, pairs, parts[p]));
      }
    }
    for (int p = 0; p < PARTS && !RIGHT; ++p) {
      const float* rows[TILE_ROWS];
      for (int64_t i = 0; i < TILE_ROWS; ++i) rows[i] = reinterpret_cast<float*>(tiles + p * TILE + i * TILE_DEPTH);
      transpose_square(rows, reinterpret_cast<float*>(to + p * TILE), TILE_ROWS);
    }
  }
  return seen.parts();
}

// The instructions by the tiles' numbers, which the intrinsics take as literals only.
template <int TO>
RECATTN_FN void clear() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TO));
}
template <int TO>
RECATTN_FN void load_tile(const Bits* from) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(TILE_DEPTH * int64_t(sizeof(Bits))), "i"(TO));
}
template <int TO, int A, int B>
RECATTN_FN void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(TO), "i"(A), "i"(B));
}
template <int FROM>
RECATTN_FN void store_tile(float* to, int64_t stride) {
  const int64_t bytes = stride * int64_t(sizeof(float));
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(bytes), "i"(FROM) : "memory");
}

// R strips of 16 rows by 4 / R of 16 columns over `depth` blocks: to out[j], of which row i lies at i * stride. a_next:
// from one strip to the next. OF: how many parts b takes. Whatever R is, a sum's terms come in the same order.
template <int R, int OF, class A>
__attribute__((noinline)) RECATTN_AMX void multiply_tiles(const Bits* a, int64_t a_next, const Bits* const* b,
                                                          int64_t depth, float* const* out, int64_t stride, A& ahead) {
  static_assert((R == 1 || R == 2) && (OF == 1 || OF == PARTS));
  asm volatile("" ::: "memory");  // what the tiles are loaded from is in memory by now
  clear<0>(), clear<1>(), clear<2>(), clear<3>();
  for (int64_t k = 0; k < depth; ++k, a += BLOCK) {
    const auto right = [&](int j, int part) __attribute__((always_inline)) { return b[j] + k * BLOCK + part * TILE; };
    // A share of what else is asked for meanwhile: the next blocks of b, which come from the second-level cache.
    const auto ask = [&](int number) __attribute__((always_inline)) {
      constexpr int LINES = 8, SHARES = OF * TILE / 32 / LINES;
#pragma GCC unroll 4
      for (int j = 0; j < 4 / R; ++j) {
#pragma GCC unroll 8
        for (int i = 0; i < LINES; ++i) __builtin_prefetch(right(j, 0) + BLOCK + (number * LINES + i) * 32, 0, 3);
      }
#pragma GCC unroll 9
      for (int i = 0; i < 18 / SHARES; ++i) ahead.ask();
    };
    if constexpr (R == 2) {
      const auto load_left = [&](int part) __attribute__((always_inline)) {
        load_tile<4>(a + part * TILE);
        load_tile<5>(a + a_next + part * TILE);
      };
      const auto load_right = [&](int part) __attribute__((always_inline)) {
        load_tile<6>(right(0, part));
        load_tile<7>(right(1, part));
      };
      const auto multiply = [&]() __attribute__((always_inline)) {
        multiply_add<0, 4, 6>(), multiply_add<1, 4, 7>(), multiply_add<2, 5, 6>(), multiply_add<3, 5, 7>();
      };
      const auto products = [&](int number) __attribute__((always_inline)) { ask(number), multiply(); };
      if constexpr (OF == 1) {
        load_left(1), load_right(0), products(0);
        load_left(0), products(1);
        load_left(2), multiply();
        continue;
      }
      load_left(0), load_right(2), products(0);
      load_right(1), products(1);
      load_left(1), products(2);
      load_right(0), products(3);
      load_left(0), products(4);
      load_left(2), products(5);
    } else {
      load_tile<4>(a), load_tile<5>(a + TILE), load_tile<6>(a + 2 * TILE);
      if constexpr (OF == 1) {
        ask(0);
        load_tile<7>(right(0, 0)), multiply_add<0, 5, 7>(), multiply_add<0, 4, 7>(), multiply_add<0, 6, 7>();
        load_tile<7>(right(1, 0)), multiply_add<1, 5, 7>(), multiply_add<1, 4, 7>(), multiply_add<1, 6, 7>();
        ask(1);
        load_tile<7>(right(2, 0)), multiply_add<2, 5, 7>(), multiply_add<2, 4, 7>(), multiply_add<2, 6, 7>();
        load_tile<7>(right(3, 0)), multiply_add<3, 5, 7>(), multiply_add<3, 4, 7>(), multiply_add<3, 6, 7>();
        continue;
      }
      ask(0);
      load_tile<7>(right(0, 2)), multiply_add<0, 4, 7>();
      load_tile<7>(right(1, 2)), multiply_add<1, 4, 7>();
      load_tile<7>(right(2, 2)), multiply_add<2, 4, 7>();
      load_tile<7>(right(3, 2)), multiply_add<3, 4, 7>();
      ask(1);
      load_tile<7>(right(0, 1)), multiply_add<0, 4, 7>(), multiply_add<0, 5, 7>();
      load_tile<7>(right(1, 1)), multiply_add<1, 4, 7>(), multiply_add<1, 5, 7>();
      ask(2);
      load_tile<7>(right(2, 1)), multiply_add<2, 4, 7>(), multiply_add<2, 5, 7>();
      load_tile<7>(right(3, 1)), multiply_add<3, 4, 7>(), multiply_add<3, 5, 7>();
      ask(3);
      load_tile<7>(right(0, 0)), multiply_add<0, 5, 7>(), multiply_add<0, 4, 7>(), multiply_add<0, 6, 7>();
      ask(4);
      load_tile<7>(right(1, 0)), multiply_add<1, 5, 7>(), multiply_add<1, 4, 7>(), multiply_add<1, 6, 7>();
      ask(5);
      load_tile<7>(right(2, 0)), multiply_add<2, 5, 7>(), multiply_add<2, 4, 7>(), multiply_add<2, 6, 7>();
      load_tile<7>(right(3, 0)), multiply_add<3, 5, 7>(), multiply_add<3, 4, 7>(), multiply_add<3, 6, 7>();
    }
  }
  store_tile<0>(out[0], stride);
  store_tile<1>(out[1], stride);
  if constexpr (R == 2) {
    store_tile<2>(out[0] + TILE_ROWS * stride, stride);
    store_tile<3>(out[1] + TILE_ROWS * stride, stride);
  } else {
    store_tile<2>(out[2], stride);
    store_tile<3>(out[3], stride);
  }
}

#else

template <class R>
constexpr bool has_tiles() {
  return false;
}
struct TileUnits {};
template <bool RIGHT>
int split_along(const float* const*, int64_t, int64_t, Bits*) { return 0; }
template <bool RIGHT>
int split_across(const float*, int64_t, int64_t, int64_t, Bits*) { return 0; }
template <int R, int OF, class A>
void multiply_tiles(const Bits*, int64_t, const Bits* const*, int64_t, float* const*, int64_t, A&) {}

#endif

// `rows` rows in strips at a, by `columns` strips of 16 columns: number j of them at strip(j), its sums at out(j), where
// there is room for whole strips. parts: how many the columns take.
template <class S, class O, class A>
void multiply_strips(const Bits* a, int64_t rows, int64_t K, int64_t columns, S strip, int parts, O out, int64_t stride,
                     A& ahead) {
  const int64_t size = strip_size(K), depth = ceil_div(K, TILE_DEPTH);
  const auto two_strips = parts == 1 ? multiply_tiles<2, 1, A> : multiply_tiles<2, PARTS, A>;
  const auto one_strip = parts == 1 ? multiply_tiles<1, 1, A> : multiply_tiles<1, PARTS, A>;
  for (int64_t j = 0; j < columns; j += 4) {
    const Bits* b[4];
    float* to[4];
    for (int64_t i = 0; i < 4; ++i) {  // the last one stands for those beyond it
      b[i] = strip(least(j + i, columns - 1));
      to[i] = out(least(j + i, columns - 1));
    }
    int64_t r = 0;
    const auto advance = [&](int64_t n) {
      r += n;
      for (float*& row : to) row += n * stride;
    };
    for (; r + TILE_ROWS < rows; advance(2 * TILE_ROWS)) {
      two_strips(a + r / TILE_ROWS * size, size, b, depth, to, stride, ahead);
      if (j + 2 < columns) two_strips(a + r / TILE_ROWS * size, size, b + 2, depth, to + 2, stride, ahead);
    }
    if (r < rows) one_strip(a + r / TILE_ROWS * size, size, b, depth, to, stride, ahead);
  }
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
