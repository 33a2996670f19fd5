// gemm.cpp's product on units that multiply tiles: both operands packed as amx.h's strips, of 16 rows or columns. A block
// of A's strips stays in the second-level cache while B's go over it, four at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <optional>

#include "amx.h"
#include "gemm_tile.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr int64_t STRIP_DEPTH = 512, STRIP_ROWS = 128, STRIP_COLUMNS = 4096;  // of a block, at most

// Up to 16 rows of a factor (RIGHT: columns, given as rows). Returns how many parts they take.
template <bool RIGHT>
int pack_strip(Matrix<float> from, int64_t n, int64_t depth, Bits* to) {
  if (from.row == 1) return split_across<RIGHT>(from.data, from.col, n, depth, to);
  const float* rows[TILE_ROWS];
  for (int64_t i = 0; i < TILE_ROWS; ++i) rows[i] = from.at(least(i, n - 1), 0);
  if (from.col == 1) return split_along<RIGHT>(rows, n, depth, to);
  float copies[TILE_ROWS * STRIP_DEPTH];
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t k = 0; k < depth; ++k) copies[i * STRIP_DEPTH + k] = *from.at(i, k);
    rows[i] = copies + i * STRIP_DEPTH;
  }
  return split_along<RIGHT>(rows, n, depth, to);
}

// n rows, in strips; where neighbours lie across, all strips by turns: a page is not visited for one line. False if an
// element has no parts.
template <bool RIGHT>
bool pack_strips(Matrix<float> from, int64_t n, int64_t depth, Bits* to) {
  const int64_t deep = from.row == 1 ? TILE_DEPTH : depth;
  bool whole = true;
  for (int64_t k = 0; k < depth; k += deep) {
    for (int64_t i = 0; i < n; i += TILE_ROWS) {
      Bits* const strip = to + i / TILE_ROWS * strip_size(depth) + k / TILE_DEPTH * BLOCK;
      whole &= 0 < pack_strip<RIGHT>(from.from(i, k), least(TILE_ROWS, n - i), least(deep, depth - k), strip);
    }
  }
  return whole;
}

// False, and nothing of use in C, where there are no such units, too little for them to do, too much padding, or an
// element has no parts.
bool product_in_tiles(const Product<float>& p) {
  if (!has_tiles<float>() || least(p.M, p.N) < LEAST_TILE_ROWS || p.K < 64) return false;
  if (3 * round_up(p.K, TILE_DEPTH) > 4 * p.K) return false;
  const int64_t kc = round_up(ceil_div(p.K, ceil_div(p.K, STRIP_DEPTH)), TILE_DEPTH), size = strip_size(kc);
  const int64_t nc = least(round_up(p.N, 4 * TILE_ROWS), STRIP_COLUMNS);
  // Two tasks a thread, if rows do for so many; else the threads share out columns too, and each packs A for itself.
  const int64_t wanted = std::max(ceil_div(p.M, STRIP_ROWS), least(2 * p.threads, p.M / (2 * TILE_ROWS)));
  const int64_t mc = round_up(ceil_div(p.M, wanted), 2 * TILE_ROWS), row_blocks = ceil_div(p.M, mc);
  const int64_t col_tasks = row_blocks < p.threads ? p.threads : 1;
  const Scratch<Bits> left(p.threads * mc / TILE_ROWS * size), right(nc / TILE_ROWS * size);
  const Scratch<float> results(p.threads * mc * 4 * TILE_ROWS);
  std::atomic<bool> large = false;
  std::atomic<int> started = 0;
#pragma omp parallel num_threads(p.threads)
  {
    const int thread = started++;
    Bits* const a = left.data + thread * mc / TILE_ROWS * size;
    float* const sums = results.data + thread * mc * 4 * TILE_ROWS;
    NothingAhead nothing;
    [[maybe_unused]] const TileUnits units;
    for (int64_t j0 = 0; j0 < p.N; j0 += nc) {
      const int64_t columns = least(nc, p.N - j0), share = round_up(ceil_div(columns, col_tasks), 4 * TILE_ROWS);
      for (int64_t k = 0; k < p.K; k += kc) {
        const int64_t depth = least(kc, p.K - k);
#pragma omp for schedule(static)
        for (int64_t j = 0; j < columns; j += 4 * TILE_ROWS) {
          const Matrix<float> from = p.b.from(k, j0 + j).transposed();
          Bits* const strips = right.data + j / TILE_ROWS * strip_size(depth);
          if (!pack_strips<true>(from, least(4 * TILE_ROWS, columns - j), depth, strips)) large = true;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < row_blocks * col_tasks; ++task) {
          const int64_t i0 = task / col_tasks * mc, rows = least(mc, p.M - i0);
          const int64_t from = task % col_tasks * share, to = least(columns, from + share);
          if (from < to && !pack_strips<false>(p.a.from(i0, k), rows, depth, a)) large = true;
          for (int64_t j = from; j < to && !large; j += 4 * TILE_ROWS) {
            const int64_t n = least(4 * TILE_ROWS, to - j);
            multiply_strips(a, rows, depth, ceil_div(n, TILE_ROWS),
                            [&](int64_t i) { return right.data + (j / TILE_ROWS + i) * strip_size(depth); }, PARTS,
                            [&](int64_t i) { return sums + i * TILE_ROWS; }, 4 * TILE_ROWS, nothing);
            for (int64_t i = 0; i < rows; ++i) {
              const float* base = p.base(i0 + i, j0 + j, k);
              float* c = p.c + (i0 + i) * p.c_row + j0 + j;
              for (Lanes<float> at = {0, n}; at.i < n; at.i += LANES<float>) {
                const Vec<float> sum = at.load(sums + i * 4 * TILE_ROWS);
                at.store(c, base ? at.load(base) + sum : sum);
              }
            }
          }
        }
      }
    }
  }
  return !large;
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
