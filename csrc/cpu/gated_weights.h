// dL/dweight_hh[m, n] = sum over steps t and rows b of grad_q[t, b, m] * h[t-1, b, n], as one product after the scan,
// and with it dL/dbias_hh[m] = sum of grad_q[t, b, m].
//
// Steps and rows come in blocks: of each, h is packed by all threads in panels as wide as a tile, and grad_q,
// transposed, by the thread whose rows m of the result it makes. Every element is summed in the order of the steps by
// one thread: the result does not depend on their number.
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
  static constexpr int64_t BLOCK = 256, CHUNK = 96;
  static constexpr int LANE = LANES<R>;

 public:
  // M columns of the gradients, N of the states. to: (M, N), or null; sums: (M,), or null.
  WeightProduct(const Terms& terms, Dtype dtype, int64_t M, int64_t N, R* to, R* sums, int threads)
      : terms(terms), dtype(dtype), M(M), N(N), to(to), sums(sums), threads(threads),
        panels(ceil_div(N, Packed::UNITS)),
        memory(Workspace::bytes<R>(2 * panels * BLOCK * Packed::UNITS) + Workspace::bytes<double>(M) +
               threads * Workspace::bytes<R>((CHUNK + LANE) * BLOCK)),
        states(memory.template take<R>(2 * panels * BLOCK * Packed::UNITS)), totals(memory.template take<double>(M)),
        grads(memory.template take<R>(threads * (CHUNK + LANE) * BLOCK)) {}

  void run() {
    on_threads(threads, [this](int64_t thread, int64_t count) { run(thread, count); });
  }

 private:
  void run(int64_t thread, int64_t count) {
    // Threads meet on multiples of a line.
    const int64_t lines = ceil_div(M, 16);
    const int64_t m0 = least(M, 16 * part(lines, thread, count)), m1 = least(M, 16 * part(lines, thread + 1, count));
    for (int64_t m = m0; m < m1; ++m) totals[m] = 0;
    typename Terms::Position position;
    Term<R> block[BLOCK];
    bool first = true;
    for (int64_t number = 0;; ++number) {
      int64_t K = 0;
      while (K < BLOCK && terms.next(position, block[K])) ++K;
      if (K == 0) break;
      // Two blocks in turn: a thread that is done packs the next one while others still read this one.
      R* const packed = states + number % 2 * panels * BLOCK * Packed::UNITS;
      if (to) {
        for (int64_t i = part(panels, thread, count); i < part(panels, thread + 1, count); ++i) {
          pack_states(block, K, i, packed + i * K * Packed::UNITS);
        }
        barrier();
      }
      for (int64_t m = m0; m < m1; m += CHUNK) {
        multiply(block, K, packed, m, least(CHUNK, m1 - m), first, grads + thread * (CHUNK + LANE) * BLOCK);
      }
      first = false;
    }
    for (int64_t m = m0; m < m1; ++m) {
      if (sums) sums[m] = R(totals[m]);
      if (to && first) memset(to + m * N, 0, N * sizeof(R));
    }
  }

  void pack_states(const Term<R>* block, int64_t K, int64_t panel, R* packed) const {
    const int64_t j = panel * Packed::UNITS, n = least(Packed::UNITS, N - j);
    for (int64_t k = 0; k < K; ++k, packed += Packed::UNITS) {
      const Term<R>& term = block[k];
      if (term.wide) {
        Packed::copy_padded(packed, static_cast<const R*>(term.state) + j, n);
      } else {
        const void* from = static_cast<const char*>(term.state) + j * size_of(dtype);
        const R* row = widened(dtype, from, packed, n);
        if (row == packed) {
          memset(packed + n, 0, (Packed::UNITS - n) * sizeof(R));
        } else {
          Packed::copy_padded(packed, row, n);
        }
      }
      if (term.times) {
        for (int64_t i = 0; i < n; ++i) packed[i] *= term.times[j + i];
      }
    }
  }

  // Rows m to m + height of the result.
  void multiply(const Term<R>* block, int64_t K, const R* packed, int64_t m, int64_t height, bool first, R* columns) {
    // Transposed: columns[i][k] = grad_q of term k at m + i.
    for (int64_t k = 0; k < K; k += LANE) {
      const int64_t depth = least(LANE, K - k);
      const R* rows[LANE];
      for (int64_t i = 0; i < LANE; ++i) rows[i] = block[k + (i < depth ? i : 0)].grad + m;
      transpose(rows, height, columns + k, BLOCK);
      if (sums) {
        double* total = totals + m;
        for (int64_t l = 0; l < depth; ++l) {
          for (int64_t i = 0; i < height; ++i) total[i] += double(rows[l][i]);
        }
      }
    }
    if (!to) return;
    const R* rows[CHUNK];
    for (int64_t i = 0; i < height; ++i) rows[i] = columns + i * BLOCK;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t j = panel * Packed::UNITS, n = least(Packed::UNITS, N - j);
      const R* weights = packed + panel * K * Packed::UNITS;
      if (n == Packed::UNITS) {
        Tiles<Packed::V, R>::run(rows, height, weights, Packed::UNITS, K, to + m * N + j, N, first);
        continue;
      }
      alignas(64) R edge[CHUNK * Packed::UNITS];
      Tiles<Packed::V, R>::run(rows, height, weights, Packed::UNITS, K, edge, Packed::UNITS, true);
      for (int64_t i = 0; i < height; ++i) {
        R* row = to + (m + i) * N + j;
        const R* sum = edge + i * Packed::UNITS;
        for (int64_t l = 0; l < n; ++l) row[l] = first ? sum[l] : row[l] + sum[l];
      }
    }
  }

  const Terms& terms;
  const Dtype dtype;
  const int64_t M, N;
  R *const to, *const sums;
  const int threads;
  const int64_t panels;
  Workspace memory;
  R* const states;
  double* const totals;
  R* const grads;
};

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
