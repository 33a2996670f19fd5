// The weights of a recurrent product, packed: for G gates of `units` outputs each, panels of all the gates of UNITS
// outputs, V vectors wide.
#pragma once

#include <atomic>

#include "amx.h"
#include "workspace.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

// Some rows that a product takes at once.
template <class R>
struct Rows {
  static constexpr int MOST = 64, STRIPS = MOST / TILE_ROWS;

  const R* row[MOST];
  int64_t n = 0;
  Bits* parts = nullptr;  // for Panels in tiles: room for STRIPS strips
  bool large[STRIPS];     // whether a strip has no parts

  void split(int64_t K) {
    if constexpr (std::is_same_v<R, float>) {
      for (int64_t r = 0; r < n; r += TILE_ROWS) {
        const int64_t strip = r / TILE_ROWS;
        large[strip] = 0 == split_along<false>(row + r, least(TILE_ROWS, n - r), K, parts + strip * strip_size(K));
      }
    }
  }
};

template <int G, class R>
struct Panels {
  static constexpr int GROUPS = G == 3 ? 1 : 4 / G, V = G * GROUPS, WIDTH = V * LANES<R>, UNITS = GROUPS * LANES<R>;

  // Weight k of an output of a gate: from[(gate * units + unit) * unit_step + k * k_step], where one of the steps is 1.
  const R* from = nullptr;
  int64_t unit_step = 0, k_step = 0;
  int64_t K = 0, units = 0;
  R* memory = nullptr;          // where they are packed; null: they are read where they are
  bool tiles = false;           // packed as each vector's strip of a right factor, as amx.h has them, else as tile.h's
  int64_t step = WIDTH;         // from one k to the next, in elements
  int64_t panel = K * WIDTH;    // from one panel to the next
  int parts = PARTS;            // how many the weights take, in tiles

  int64_t count() const { return ceil_div(units, UNITS); }
  static int64_t bytes(int64_t K, int64_t units, bool tiles) {
    return ceil_div(units, UNITS) * V * (tiles ? strip_size(K) * sizeof(Bits) : K * VECTOR_BYTES);
  }

  // The first output of vector v of a panel, and how many of that vector's exist.
  const R* first(int64_t i, int64_t v) const { return from + (v / GROUPS * units + unit(i, v)) * unit_step; }
  int64_t unit(int64_t i, int64_t v) const { return i * UNITS + v % GROUPS * LANES<R>; }
  int64_t present(int64_t i, int64_t v) const {
    const int64_t left = units - unit(i, v);
    return left < 0 ? 0 : least(left, LANES<R>);
  }

  // Packs one thread's share of the panels. Returns how many parts they take, in tiles.
  int pack(int64_t thread, int64_t threads, const R* zeros) const {
    int parts = 1;
    for (int64_t i = part(count(), thread, threads); i < part(count(), thread + 1, threads) && memory; ++i) {
      R* const to = memory + i * panel;
      for (int64_t k = 0; k < K && k_step != 1 && !tiles; ++k) {
        for (int64_t v = 0; v < V; ++v) {
          store_vector(to + k * WIDTH + v * LANES<R>, load_part(first(i, v) + k * k_step, present(i, v)));
        }
      }
      for (int64_t v = 0; v < V && (k_step == 1 || tiles); ++v) {
        const R* rows[LANES<R>];
        const int64_t n = present(i, v);
        for (int lane = 0; lane < LANES<R>; ++lane) rows[lane] = lane < n ? first(i, v) + lane * unit_step : zeros;
        if (tiles) {
          parts = parts_of_both(parts, pack_strip(rows, n, strip(i, v)));
        } else {
          transpose(rows, K, to + v * LANES<R>, WIDTH);
        }
      }
    }
    return parts;
  }

  // Rows and this many k of a panel stay in the second-level cache while the rows' tiles go over them.
  static constexpr int64_t K_BLOCK = 512;

  // out[r][panel - begin][v] for all rows and panels begin to end, with out_stride elements from one row to the next,
  // v_stride from one vector of a row to the next and a vector from one panel to the next. In tiles it is written for
  // whole strips of rows.
  template <class A>
  void product(const Rows<R>& rows, int64_t begin, int64_t end, R* out, int64_t out_stride, int64_t v_stride,
               A& ahead) const {
    if (tiles) return product_of_tiles(rows, begin, end, out, out_stride, v_stride, ahead);
    const R* const packed = memory ? memory : from;
    const int64_t blocks = ceil_div(K, K_BLOCK);
    const R* block[Rows<R>::MOST];
    for (int64_t i = begin; i < end; ++i, out += LANES<R>) {
      for (int64_t number = 0; number < blocks; ++number) {
        const int64_t k0 = part(K, number, blocks), k1 = part(K, number + 1, blocks);
        for (int64_t r = 0; r < rows.n; ++r) block[r] = rows.row[r] + k0;
        Tiles<V, R>::run(block, rows.n, packed + i * panel + k0 * step, step, k1 - k0, out, out_stride, v_stride,
                         number == 0, ahead);
      }
    }
  }

 private:
  Bits* strip(int64_t i, int64_t v) const { return reinterpret_cast<Bits*>(memory) + (i * V + v) * strip_size(K); }

  int pack_strip(const R* const* rows, int64_t n, Bits* to) const {
    if constexpr (std::is_same_v<R, float>) {
      return k_step == 1 ? split_along<true>(rows, n, K, to) : split_across<true>(rows[0], k_step, n, K, to);
    }
    return 0;
  }

  template <class A>
  void product_of_tiles(const Rows<R>& rows, int64_t begin, int64_t end, R* out, int64_t out_stride, int64_t v_stride,
                        A& ahead) const {
    if constexpr (std::is_same_v<R, float>) {
      const auto to = [&](int64_t i) { return out + i / V * LANES<R> + i % V * v_stride; };
      multiply_strips(rows.parts, rows.n, K, (end - begin) * V, [&](int64_t i) { return strip(begin, i); }, parts, to,
                      out_stride, ahead);
      for (int64_t r = 0; r < rows.n; ++r) {
        if (!rows.large[r / TILE_ROWS]) continue;
        for (int64_t i = 0; i < (end - begin) * V; ++i) {
          plain(rows.row[r], begin + i / V, i % V, to(i) + r * out_stride);
        }
      }
    }
  }

  // Vector v of one row's product, from the weights as they came.
  __attribute__((noinline)) void plain(const R* row, int64_t i, int64_t v, R* out) const {
    const int64_t n = present(i, v);
    const R* weights = first(i, v);
    if (k_step != 1) {
      Vec<R> sum = {};
      for (int64_t k = 0; k < K; ++k) sum += row[k] * load_part(weights + k * k_step, n);
      return store_vector(out, sum);
    }
    for (int64_t lane = 0; lane < n; ++lane, weights += unit_step) {
      Vec<R> sums = {};
      for (Lanes<R> at = {0, K}; at.i < K; at.i += LANES<R>) sums += at.load(row) * at.load(weights);
      out[lane] = 0;
      for (int l = 0; l < LANES<R>; ++l) out[lane] += sums[l];
    }
  }
};

// What threads have seen of the weights: one that has no parts, one that has a second.
struct SeenByAll {
  std::atomic<bool> large = false, second = false;
};

// Packs the weights of a kernel's products, by all threads: as floats where a weight of them has no parts. All threads
// are to meet before the first product.
template <class R, class... P>
void pack(const Member& member, SeenByAll& seen, const R* zeros, P&... panels) {
  int parts = 1;
  ((parts = parts_of_both(parts, panels.pack(member.thread, member.threads, zeros))), ...);
  if (!(panels.tiles || ...)) return;
  if (parts == 0) seen.large = true;
  if (parts > 1) seen.second = true;
  member.meet();
  if (!seen.large) {
    if (member.thread == 0) ((panels.parts = seen.second ? PARTS : 1), ...);
    return;
  }
  if (member.thread == 0) ((panels.tiles = false), ...);
  member.meet();
  (panels.pack(member.thread, member.threads, zeros), ...);
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
