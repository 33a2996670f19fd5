// The backward of additive attention. The activation is computed again, so that nothing of size (B, N, A) is kept.
//
//   da[n] = dcontext . values[n] + dweights[n];  dvalues[n] = a[n] dcontext
//   de[n] = a[n] (da[n] - sum over m of a[m] da[m])
//   dkeys[n] = de[n] weight act'(keys[n] + query);  dquery = sum over n of dkeys[n]
//   dweight = sum over b and n of de[n] act(keys[n] + query)
#include "additive_rows.h"
#include "streaming.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr int64_t ROWS = AdditiveBackward::ROWS;

// Calls work(i) for i from 0 to count - 1, over threads.
template <class F>
void each(int threads, int64_t count, F work) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; ++i) work(i);
    end_streaming();
  }
}

template <class S, class R>
void values_backward(const AdditiveBackward& p) {
  const bool stream = streams(p.grad_values, p.B * p.N, p.D * sizeof(S));
  each(threads_for(p, p.B * p.N * p.D), p.B * p.N, [&](int64_t i) {
    const int64_t b = i / p.N, n = i % p.N;
    const bool flows = kept(p, b, n);
    const R* const g = p.grad_context && flows ? static_cast<const R*>(p.grad_context) + b * p.D : nullptr;
    const S* const v = row<S>(p.values, b, n);
    S* const dv = p.grad_values ? static_cast<S*>(p.grad_values) + i * p.D : nullptr;
    const R a = static_cast<const R*>(p.softmax)[i];
    R sums[CHUNK] = {};
    if (g) {
      each_chunk(p.D, [&](int64_t d, auto count) {
        R buffer[CHUNK];
        alignas(64) R out[CHUNK];
        const R* const part = chunk(v + d, buffer, count);
        for (int64_t j = 0; j < count; ++j) sums[j] += g[d + j] * part[j];
        if (dv) {
          for (int64_t j = 0; j < count; ++j) out[j] = a * g[d + j];
          write<CHUNK>(dv + d, out, count, stream);
        }
      });
    } else if (dv) {
      memset(static_cast<void*>(dv), 0, p.D * sizeof(S));
    }
    const R dweights = p.grad_weights && flows ? static_cast<const R*>(p.grad_weights)[i] : R(0);
    static_cast<R*>(p.scores)[i] = total(sums) + dweights;
  });
}

// In place: from what arrives at the softmax to what arrives at the scores.
template <class R>
void softmax_backward(const AdditiveBackward& p) {
#pragma omp parallel for schedule(static) num_threads(threads_for(p, 8 * p.B * p.N))
  for (int64_t b = 0; b < p.B; ++b) {
    const R* const a = static_cast<const R*>(p.softmax) + b * p.N;
    R* const d = static_cast<R*>(p.scores) + b * p.N;
    double mean = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      if (kept(p, b, n)) mean += double(a[n]) * double(d[n]);
    }
    for (int64_t n = 0; n < p.N; ++n) d[n] = kept(p, b, n) ? R(a[n] * (d[n] - mean)) : R(0);
  }
}

// One position: its dkeys, and what it adds to dquery and dweight.
template <Activation ACT, class S, class R>
RECATTN_FN void key_backward(const S* keys, const R* query, const R* weight, R de, int64_t A, S* grad_keys,
                             bool stream, R* __restrict dquery, R* __restrict dweight) {
  each_chunk(A, [&](int64_t a, auto count) {
    R buffer[CHUNK];
    alignas(64) R out[CHUNK];
    const R* const k = chunk(keys + a, buffer, count);
    for (int64_t j = 0; j < count; ++j) {
      const R h = activate<ACT>(k[j] + query[a + j], R(0));
      const R dk = times_derivative<ACT>(de * weight[a + j], derivative<ACT>(h, R(0)));
      out[j] = dk;
      dquery[a + j] += dk;
      dweight[a + j] += de * h;
    }
    if (grad_keys) write<CHUNK>(grad_keys + a, out, count, stream);
  });
}

template <Activation ACT, class S, class R>
void keys_backward(const AdditiveBackward& p) {
  const int64_t blocks = (p.N + ROWS - 1) / ROWS;
  const bool stream = streams(p.grad_keys, p.B * p.N, p.A * sizeof(S));
  each(threads_for(p, p.B * p.N * p.A), p.B * blocks, [&](int64_t i) {
    const int64_t b = i / blocks, first = i % blocks * ROWS, end = first + ROWS < p.N ? first + ROWS : p.N;
    const R* const query = static_cast<const R*>(p.query) + b * p.A;
    R* const dquery = static_cast<R*>(p.sums) + i * p.A;
    R* const dweight = static_cast<R*>(p.sums) + (p.B * blocks + i) * p.A;
    for (int64_t a = 0; a < p.A; ++a) dquery[a] = dweight[a] = 0;
    for (int64_t n = first; n < end; ++n) {
      S* const dkeys = p.grad_keys ? static_cast<S*>(p.grad_keys) + (b * p.N + n) * p.A : nullptr;
      if (kept(p, b, n)) {
        key_backward<ACT>(row<S>(p.keys, b, n), query, static_cast<const R*>(p.weight),
                          static_cast<const R*>(p.scores)[b * p.N + n], p.A, dkeys, stream, dquery, dweight);
      } else if (dkeys) {
        memset(static_cast<void*>(dkeys), 0, p.A * sizeof(S));
      }
    }
  });
}

// out[i] = sum over so many rows of rows[.][i], for each of `groups` groups of rows.
template <class R>
void sum_rows(const Additive& p, const R* rows, int64_t groups, int64_t count, R* out) {
  const int64_t chunks = (p.A + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads_for(p, groups * count * p.A))
  for (int64_t i = 0; i < groups * chunks; ++i) {
    const int64_t group = i / chunks, first = i % chunks * CHUNK;
    const int64_t n = p.A - first < CHUNK ? p.A - first : CHUNK;
    double sums[CHUNK] = {};
    for (int64_t r = 0; r < count; ++r) {
      const R* const from = rows + (group * count + r) * p.A + first;
      for (int64_t j = 0; j < n; ++j) sums[j] += from[j];
    }
    for (int64_t j = 0; j < n; ++j) out[group * p.A + first + j] = R(sums[j]);
  }
}

template <class R>
void sums(const AdditiveBackward& p) {
  const int64_t blocks = (p.N + ROWS - 1) / ROWS;
  const R* const dquery = static_cast<const R*>(p.sums);
  if (p.grad_query) sum_rows(p, dquery, p.B, blocks, static_cast<R*>(p.grad_query));
  if (p.grad_weight) sum_rows(p, dquery + p.B * blocks * p.A, 1, p.B * blocks, static_cast<R*>(p.grad_weight));
}

}  // namespace

void additive_backward(const AdditiveBackward& p) {
  by_dtype(p, p.values, [&]<class S, class R>() { values_backward<S, R>(p); });
  if (!p.grad_query && !p.grad_keys && !p.grad_weight) return;
  p.wide ? softmax_backward<double>(p) : softmax_backward<float>(p);
  by_activation(p, [&]<Activation ACT, class S, class R>() { keys_backward<ACT, S, R>(p); });
  p.wide ? sums<double>(p) : sums<float>(p);
}

}  // namespace RECATTN_ISA
}  // namespace recattn
