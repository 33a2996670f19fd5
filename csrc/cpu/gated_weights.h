// dL/dweight_hh[m, n] = sum over steps t and rows b of grad_q[t, b, m] * h[t-1, b, n], as one product after the scan,
// and with it dL/dbias_hh[m] = sum of grad_q[t, b, m].
//
// Steps and rows come in blocks: of each, h is packed by all threads in panels as wide as a tile, and grad_q,
// transposed, by the thread whose rows m of the result it makes; for amx.h's units both are split into parts. Every
// element is summed in the order of the steps by one thread: the result does not depend on their number.
#pragma once

#include "gated.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

// The rows of one step's factors.
template <class R>
struct Term {
  const R* grad;      // grad_q
  const void* state;  // h[t-1]: of the sequences' type, or of R at the first step
  const R* times;     // null, or what h is multiplied by
  bool wide;
};

// Terms::next(position, term) gives the terms in their order, and false after the last.
template <class R, class Terms>
class WeightProduct {
  using Packed = Panels<1, R>;
  static constexpr int64_t STEPS = 256, CHUNK = 96;  // terms of a block; rows of the result
  static constexpr int LANE = LANES<R>, V = Packed::V, UNITS = Packed::UNITS;

 public:
  // M columns of the gradients, N of the states. to: (M, N), or null; sums: (M,), or null. tiles: whether of amx.h's.
  WeightProduct(const Terms& terms, Dtype dtype, int64_t M, int64_t N, R* to, R* sums, bool tiles,
                int threads)
      : terms(terms), dtype(dtype), M(M), N(N), to(to), sums(sums), tiles(tiles && to), threads(threads),
        panels(ceil_div(N, UNITS)), state_parts(this->tiles ? V * strip_size(STEPS) : 0),
        grad_parts(this->tiles ? CHUNK / TILE_ROWS * strip_size(STEPS) : 0),
        memory(Workspace::bytes<R>(2 * panels * STEPS * UNITS) + Workspace::bytes<double>(M) +
               threads * Workspace::bytes<R>((CHUNK + LANE) * STEPS) + Workspace::bytes<int>(2 * panels) +
               Workspace::bytes<Bits>(2 * panels * state_parts) + threads * Workspace::bytes<Bits>(grad_parts)),
        states(memory.template take<R>(2 * panels * STEPS * UNITS)), totals(memory.template take<double>(M)),
        grads(memory.template take<R>(threads * (CHUNK + LANE) * STEPS)),
        parts_of_states(memory.template take<int>(2 * panels)),
        parts(memory.template take<Bits>(2 * panels * state_parts)),
        left(memory.template take<Bits>(threads * grad_parts)) {}

  void run() {
    on_threads(threads, [this](const Member& member) { run(member); });
  }

 private:
  void run(const Member& member) {
    const int64_t thread = member.thread, count = member.threads;
    // Threads meet on multiples of a line.
    const int64_t lines = ceil_div(M, 16);
    const int64_t m0 = least(M, 16 * part(lines, thread, count)), m1 = least(M, 16 * part(lines, thread + 1, count));
    for (int64_t m = m0; m < m1; ++m) totals[m] = 0;
    typename Terms::Position position;
    Term<R> block[STEPS];
    std::optional<TileUnits> units;
    if (tiles) units.emplace();
    bool first = true;
    for (int64_t number = 0;; ++number) {
      int64_t K = 0;
      while (K < STEPS && terms.next(position, block[K])) ++K;
      if (K == 0) break;
      // Two blocks in turn: a thread that is done packs the next one while others still read this one.
      const int64_t turn = number % 2 * panels;
      if (to) {
        for (int64_t i = part(panels, thread, count); i < part(panels, thread + 1, count); ++i) {
          R* const panel = states + (turn + i) * STEPS * UNITS;
          pack_states(block, K, i, panel);
          parts_of_states[turn + i] = tiles ? split_states(panel, K, parts + (turn + i) * state_parts) : 0;
        }
        member.meet();
      }
      for (int64_t m = m0; m < m1; m += CHUNK) {
        multiply(block, K, turn, m, least(CHUNK, m1 - m), first, thread);
      }
      first = false;
    }
    for (int64_t m = m0; m < m1; ++m) {
      if (sums) sums[m] = R(totals[m]);
      if (to && first) memset(to + m * N, 0, N * sizeof(R));
    }
  }

  void pack_states(const Term<R>* block, int64_t K, int64_t panel, R* packed) const {
    const int64_t j = panel * UNITS, n = least(UNITS, N - j);
    for (int64_t k = 0; k < K; ++k, packed += UNITS) {
      const Term<R>& term = block[k];
      if (term.wide) {
        copy_padded(packed, static_cast<const R*>(term.state) + j, n);
      } else {
        const void* from = static_cast<const char*>(term.state) + j * size_of(dtype);
        const R* row = widened(dtype, from, packed, n);
        if (row == packed) {
          memset(packed + n, 0, (UNITS - n) * sizeof(R));
        } else {
          copy_padded(packed, row, n);
        }
      }
      if (term.times) {
        for (int64_t i = 0; i < n; ++i) packed[i] *= term.times[j + i];
      }
    }
  }

  int split_states(const R* panel, int64_t K, Bits* strips) const {
    int needed = 1;
    if constexpr (std::is_same_v<R, float>) {
      for (int v = 0; v < V; ++v, strips += strip_size(K)) {
        needed = parts_of_both(needed, split_across<true>(panel + v * LANE, UNITS, LANE, K, strips));
      }
    }
    return needed;
  }

  // Rows m to m + height of the result.
  void multiply(const Term<R>* block, int64_t K, int64_t turn, int64_t m, int64_t height, bool first, int64_t thread) {
    // Transposed: columns[i][k] = grad_q of term k at m + i.
    R* const columns = grads + thread * (CHUNK + LANE) * STEPS;
    for (int64_t k = 0; k < K; k += LANE) {
      const int64_t depth = least(LANE, K - k);
      const R* rows[LANE];
      for (int64_t i = 0; i < LANE; ++i) rows[i] = block[k + (i < depth ? i : 0)].grad + m;
      transpose(rows, height, columns + k, STEPS);
      if (sums) {
        double* total = totals + m;
        for (int64_t l = 0; l < depth; ++l) {
          for (int64_t i = 0; i < height; ++i) total[i] += double(rows[l][i]);
        }
      }
    }
    if (!to) return;
    const R* rows[CHUNK];
    for (int64_t i = 0; i < height; ++i) rows[i] = columns + i * STEPS;
    Bits* const strips = left + thread * grad_parts;
    bool split = tiles;
    for (int64_t i = 0; i < height && split; i += TILE_ROWS) {
      if constexpr (std::is_same_v<R, float>) {
        Bits* const strip = strips + i / TILE_ROWS * strip_size(K);
        split = 0 < split_along<false>(rows + i, least(TILE_ROWS, height - i), K, strip);
      }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t j = panel * UNITS, n = least(UNITS, N - j);
      const R* weights = states + (turn + panel) * STEPS * UNITS;
      const bool parted = split && parts_of_states[turn + panel] > 0;
      if (n == UNITS && !parted) {
        Tiles<V, R>::run(rows, height, weights, UNITS, K, to + m * N + j, N, first);
        continue;
      }
      alignas(64) R edge[CHUNK * UNITS];
      if (!parted) {
        Tiles<V, R>::run(rows, height, weights, UNITS, K, edge, UNITS, true);
      } else if constexpr (std::is_same_v<R, float>) {
        NothingAhead nothing;
        const Bits* right = parts + (turn + panel) * state_parts;
        multiply_strips(strips, height, K, V, [&](int64_t v) { return right + v * strip_size(K); },
                        parts_of_states[turn + panel], [&](int64_t v) { return edge + v * LANE; }, UNITS, nothing);
      }
      for (int64_t i = 0; i < height; ++i) {
        R* row = to + (m + i) * N + j;
        const R* sum = edge + i * UNITS;
        for (int64_t l = 0; l < n; ++l) row[l] = first ? sum[l] : row[l] + sum[l];
      }
    }
  }

  static void copy_padded(R* to, const R* from, int64_t n) {
    if (n == UNITS) {
      memcpy(to, from, UNITS * sizeof(R));
    } else {
      memcpy(to, from, n * sizeof(R));
      memset(to + n, 0, (UNITS - n) * sizeof(R));
    }
  }

  const Terms& terms;
  const Dtype dtype;
  const int64_t M, N;
  R *const to, *const sums;
  const bool tiles;  // in amx.h's
  const int threads;
  const int64_t panels, state_parts, grad_parts;
  Workspace memory;
  R* const states;
  double* const totals;
  R* const grads;
  int* const parts_of_states;  // how many parts the states of a panel take
  Bits *const parts, *const left;
};

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
