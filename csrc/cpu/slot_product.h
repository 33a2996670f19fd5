// The products of slot attention, of a few rows with a block of inputs; they ask for the next block's memory meanwhile.
#pragma once

#include "tile.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

// out[r][c] (+)= sum over i of a(r, i) * weights[i * step + c], for ROWS r and V vectors of c, added to what is there
// unless `first`. a(r, i) is a[r * a_step + i], or a[i * a_step + r] if TURNED. One line is asked for at every i, or two if
// `often`.
template <bool TURNED, int ROWS, int V, class R>
__attribute__((noinline)) void product_tile(const R* a, int64_t a_step, const R* weights, int64_t step, int64_t inner,
                                            R* out, int64_t out_stride, bool first, bool often, Ahead& ahead) {
  uintptr_t line = ahead.line, line_end = ahead.end;
  int64_t line_step = ahead.step;
  const auto ask_for_two = [&]() __attribute__((always_inline)) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
    __builtin_prefetch(reinterpret_cast<const void*>(line + line_step), 0, 2);
    line += 2 * line_step;
    if (__builtin_expect(line >= line_end, 0)) {
      line = ahead.next(line);
      line_end = ahead.end, line_step = ahead.step;
    }
  };
  Vec<R> sums[ROWS][V] = {};
  const auto products = [&]() __attribute__((always_inline)) {
    Vec<R> w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = load_vector(weights + v * LANES<R>);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += w[v] * a[TURNED ? r : r * a_step];
    }
    a += TURNED ? a_step : 1, weights += step;
  };
  int64_t i = 0;
  for (; i + 2 <= inner; i += 2) {
    ask_for_two();
    products();
    if (often) ask_for_two();
    products();
  }
  if (i < inner) products();
  ahead.line = line;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      R* const to = out + r * out_stride + v * LANES<R>;
      store_vector(to, first ? sums[r][v] : load_vector(to) + sums[r][v]);
    }
  }
}

// The same for any number of rows, and of columns that is a multiple of a vector.
template <bool TURNED = false, class R>
void product(const R* a, int64_t a_step, int64_t rows, const R* weights, int64_t step, int64_t inner, R* out,
             int64_t out_stride, int64_t columns, bool first, Ahead& ahead) {
  // The fewer the rows, the fewer steps there are to ask in.
  const bool often = rows <= Tiles<2, R>::ROWS;
  int64_t c = 0;
  const auto panels = [&]<int V>() {
    constexpr int ROWS = Tiles<V, R>::ROWS;
    const int64_t tiles = ceil_div(rows, ROWS);
    for (; c + V * LANES<R> <= columns; c += V * LANES<R>) {
      int64_t i = 0;
      do {  // so much of the weights stays in the first-level cache while all tiles go over it
        const int64_t n = least(CHAIN, inner - i);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t r = part(rows, t, tiles);
          by_height<ROWS>(part(rows, t + 1, tiles) - r, [&]<int HEIGHT>() {
            const R* const from = TURNED ? a + i * a_step + r : a + r * a_step + i;
            product_tile<TURNED, HEIGHT, V>(from, a_step, weights + i * step + c, step, n, out + r * out_stride + c,
                                            out_stride, first && i == 0, often, ahead);
          });
        }
        i += n;
      } while (i < inner);
    }
  };
  if (rows <= Tiles<4, R>::ROWS) panels.template operator()<4>();
  panels.template operator()<2>();
  panels.template operator()<1>();
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
