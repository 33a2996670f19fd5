// Products of a few rows with a panel of packed weights: where the time of the recurrent kernels goes.
//
// A panel is V vectors wide, and lies in memory in the order in which the product reads it, [k][vector][lane]. The sums
// of a tile, ROWS x V vectors, stay in registers over all k.
#pragma once

#include "ahead.h"

// The loop that follows reads and writes no element in more than one of its steps. clang checks that at run time.
#if defined(__GNUC__) && !defined(__clang__)
#define RECATTN_INDEPENDENT _Pragma("GCC ivdep")
#else
#define RECATTN_INDEPENDENT
#endif

namespace recattn {
namespace RECATTN_ISA {
namespace {

// As many as leave registers for the weights and an element of a row.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int SUMS = 24;
#else
constexpr int SUMS = 12;
#endif

// Where part i of n of 0..size begins.
[[maybe_unused]] inline int64_t part(int64_t size, int64_t i, int64_t n) { return size * i / n; }

// A sum of many products is one of sums of so many: its error grows with CHAIN + K / CHAIN, not with K.
constexpr int64_t CHAIN = 64;

// out[r][v] (+)= sum over k of rows[r][k] * weights[k][v], added to what is there unless `first`. out_stride is from one r
// to the next, v_stride from one v. ahead: Ahead, or NothingAhead.
template <int ROWS, int V, class R, class A>
__attribute__((noinline)) void tile(const R* const* rows, const R* weights, int64_t step, int64_t K, R* out,
                                    int64_t out_stride, int64_t v_stride, bool first, A& ahead) {
  const R* row[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) row[r] = rows[r];
  int64_t k = 0;
  do {
    Vec<R> sums[ROWS][V] = {};
    const auto products = [&]() __attribute__((always_inline)) {
      Vec<R> w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = load_vector(weights + v * LANES<R>);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] += w[v] * row[r][k];
      }
      ++k, weights += step;
    };
    const int64_t end = least(K, k + CHAIN);
    while (k + 4 <= end) {  // one by one, what counts them would take the arithmetic units' time
      ahead.ask();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) products();
    }
    while (k < end) products();
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        R* const to = out + r * out_stride + v * v_stride;
        store_vector(to, first ? sums[r][v] : load_vector(to) + sums[r][v]);
      }
    }
    first = false;
  } while (k < K);
}

// f.operator()<n>(), of which there is one for each n up to MOST.
template <int MOST, class F>
void by_height(int64_t n, F f) {
  static_assert(MOST <= 8);
  const auto of = [&]<int HEIGHT>() { f.template operator()<(HEIGHT < MOST ? HEIGHT : MOST)>(); };
  switch (n) {
    case 1: return of.template operator()<1>();
    case 2: return of.template operator()<2>();
    case 3: return of.template operator()<3>();
    case 4: return of.template operator()<4>();
    case 5: return of.template operator()<5>();
    case 6: return of.template operator()<6>();
    case 7: return of.template operator()<7>();
    default: return of.template operator()<8>();
  }
}

template <int V, class R>
struct Tiles {
  static constexpr int ROWS = SUMS / V < 8 ? SUMS / V : 8;

  // n rows in tiles of about equal height, so that none is too low to keep the arithmetic units busy.
  template <class A>
  static void run(const R* const* rows, int64_t n, const R* weights, int64_t step, int64_t K, R* out,
                  int64_t out_stride, int64_t v_stride, bool first, A& ahead) {
    const int64_t tiles = ceil_div(n, ROWS);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t from = part(n, i, tiles);
      by_height<ROWS>(part(n, i + 1, tiles) - from, [&]<int HEIGHT>() {
        tile<HEIGHT, V>(rows + from, weights, step, K, out + from * out_stride, out_stride, v_stride, first, ahead);
      });
    }
  }
  static void run(const R* const* rows, int64_t n, const R* weights, int64_t step, int64_t K, R* out,
                  int64_t out_stride, bool first) {
    NothingAhead nothing;
    run(rows, n, weights, step, K, out, out_stride, LANES<R>, first, nothing);
  }
};

// a0 b0 a1 b1 ... of the lower halves of a and b, and of the upper ones.
template <class V>
RECATTN_FN void interleave(const V& a, const V& b, V& low, V& high) {
  constexpr int N = sizeof(V) / sizeof(a[0]);
  if constexpr (N == 2) {
    low = __builtin_shufflevector(a, b, 0, 2);
    high = __builtin_shufflevector(a, b, 1, 3);
  } else if constexpr (N == 4) {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else if constexpr (N == 8) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// to[i * stride + lane] = rows[lane][i] for i < LANES.
template <class R>
RECATTN_FN void transpose_square(const R* const* rows, R* to, int64_t stride) {
  constexpr int N = LANES<R>;
  Vec<R> a[N], b[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) memcpy(&a[i], rows[i], VECTOR_BYTES);
  // Each round moves the lowest bit of the lane's number to the row's; after all of them the two are exchanged.
#pragma GCC unroll 4
  for (int round = 1; round < N; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) interleave(a[i], a[i + N / 2], b[2 * i], b[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) memcpy(to + i * stride, &a[i], VECTOR_BYTES);
}

#ifdef __AVX512F__
// The loads gather quarters of a vector, which leaves half of the shuffles, and those within quarters.
RECATTN_FN void transpose_square(const float* const* rows, float* to, int64_t stride) {
#pragma GCC unroll 4
  for (int column = 0; column < 16; column += 4) {
    Vec<float> a[4], b[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // columns 0..3 of rows i, i + 4, i + 8, i + 12
      __m512 quarters = _mm512_maskz_broadcast_f32x4(ALL, _mm_loadu_ps(rows[i] + column));
      quarters = _mm512_mask_broadcast_f32x4(quarters, 0x00f0, _mm_loadu_ps(rows[i + 4] + column));
      quarters = _mm512_mask_broadcast_f32x4(quarters, 0x0f00, _mm_loadu_ps(rows[i + 8] + column));
      quarters = _mm512_mask_broadcast_f32x4(quarters, 0xf000, _mm_loadu_ps(rows[i + 12] + column));
      a[i] = (Vec<float>)quarters;
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vec<float> &even = a[2 * i], &odd = a[2 * i + 1];
      b[i] = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
      b[2 + i] = __builtin_shufflevector(even, odd, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vec<double> first = (Vec<double>)b[2 * i], second = (Vec<double>)b[2 * i + 1],
                        even = __builtin_shufflevector(first, second, 0, 8, 2, 10, 4, 12, 6, 14),
                        odd = __builtin_shufflevector(first, second, 1, 9, 3, 11, 5, 13, 7, 15);
      memcpy(to + (column + 2 * i) * stride, &even, VECTOR_BYTES);
      memcpy(to + (column + 2 * i + 1) * stride, &odd, VECTOR_BYTES);
    }
  }
}
#endif

// to[k * stride + lane] = rows[lane][k] for k < n.
template <class R>
void transpose(const R* const* rows, int64_t n, R* to, int64_t stride) {
  constexpr int N = LANES<R>;
  int64_t k = 0;
  for (; k + N <= n; k += N) {
    const R* from[N];
    for (int i = 0; i < N; ++i) from[i] = rows[i] + k;
    transpose_square(from, to + k * stride, stride);
  }
  for (; k < n; ++k) {
    for (int lane = 0; lane < N; ++lane) to[k * stride + lane] = rows[lane][k];
  }
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
