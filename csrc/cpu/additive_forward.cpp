// Additive attention: keys and values are read once each, and of what lies between only (B, N) numbers are written.
//
//   e[n] = weight . act(keys[n] + query);  a = softmax over n of e;  context = sum over n of a[n] values[n]
#include "additive_rows.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

// weight . act(keys + query)
template <Activation ACT, class S, class R>
RECATTN_FN R score(const S* keys, const R* query, const R* weight, int64_t A) {
  R sums[CHUNK] = {}, buffer[CHUNK];
  each_chunk(A, [&](int64_t a, auto count) {
    const R* const k = chunk(keys + a, buffer, count);
    for (int64_t j = 0; j < count; ++j) sums[j] += weight[a + j] * activate<ACT>(k[j] + query[a + j], R(0));
  });
  return total(sums);
}

template <Activation ACT, class S, class R>
void scores(const AdditiveForward& p) {
  R* const e = static_cast<R*>(p.softmax);
#pragma omp parallel for schedule(static) num_threads(threads_for(p, p.B * p.N * p.A))
  for (int64_t i = 0; i < p.B * p.N; ++i) {
    const int64_t b = i / p.N, n = i % p.N;
    if (kept(p, b, n)) {
      e[i] = score<ACT>(row<S>(p.keys, b, n), static_cast<const R*>(p.query) + b * p.A, static_cast<const R*>(p.weight),
                        p.A);
    }
  }
}

// exp(x) for x <= 0. That of far less than the others is 0, as in torch.
RECATTN_FN float weight_of(float x) { return x < -87.0f ? 0.0f : exp_(x); }
RECATTN_FN double weight_of(double x) { return exp_(x); }

// In place. What is masked becomes 0; NaN anywhere, or a score of infinity, makes NaN of the rest.
template <class R>
void softmax(const Additive& p, int64_t b, R* e) {
  R most = -INFINITY;
  for (int64_t n = 0; n < p.N; ++n) {
    if (kept(p, b, n) && e[n] > most) most = e[n];
  }
  double sum = 0;
  for (int64_t n = 0; n < p.N; ++n) {
    e[n] = kept(p, b, n) ? weight_of(e[n] - most) : R(0);
    sum += e[n];
  }
  if (sum == 0) return;  // every position is masked
  for (int64_t n = 0; n < p.N; ++n) e[n] = R(e[n] / sum);
}

// context (+)= sum over so many rows of weights[r] * rows[r], which next lie `ahead` bytes further on.
template <int ROWS, class S, class R>
RECATTN_FN void add_rows(const S* const* rows, const R* weights, int64_t D, R* context, int64_t ahead) {
  each_chunk(D, [&](int64_t d, auto count) {
    R sums[CHUNK] = {}, buffer[CHUNK];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const R* const v = chunk(rows[r] + d, buffer, count, ahead);
      for (int64_t j = 0; j < count; ++j) sums[j] += weights[r] * v[j];
    }
    for (int64_t j = 0; j < count; ++j) context[d + j] += sums[j];
  });
}

// Values from `begin` to `end` of every row: context = sum over n of a[n] values[n]
template <class S, class R>
void average(const AdditiveForward& p, int64_t b, int64_t begin, int64_t end) {
  constexpr int ROWS = 8;
  const R* const a = static_cast<const R*>(p.softmax) + b * p.N;
  R* const context = static_cast<R*>(p.context) + b * p.D + begin;
  for (int64_t d = 0; d < end - begin; ++d) context[d] = 0;
  const int64_t ahead = p.values.stride_n * sizeof(S);
  const S* rows[ROWS];
  R weights[ROWS];
  int count = 0;
  for (int64_t n = 0; n < p.N; ++n) {
    if (!kept(p, b, n)) continue;
    rows[count] = row<S>(p.values, b, n) + begin;
    weights[count++] = a[n];
    if (count == ROWS) {
      add_rows<ROWS>(rows, weights, end - begin, context, ROWS * ahead);
      count = 0;
    }
  }
  for (int r = 0; r < count; ++r) add_rows<1>(rows + r, weights + r, end - begin, context, ahead);
}

template <class S, class R>
void contexts(const AdditiveForward& p) {
  // A row's values are split only where there are fewer rows than threads. Every sum is the same either way.
  const int threads = threads_for(p, p.B * p.N * p.D);
  const int64_t parts = p.B < threads ? (threads + p.B - 1) / p.B : 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < p.B * parts; ++i) {
    const int64_t part = i % parts, chunks = (p.D + CHUNK - 1) / CHUNK;
    const int64_t begin = chunks * part / parts * CHUNK, end = chunks * (part + 1) / parts * CHUNK;
    average<S, R>(p, i / parts, begin, end < p.D ? end : p.D);
  }
}

template <class R>
void softmaxes(const AdditiveForward& p) {
#pragma omp parallel for schedule(static) num_threads(threads_for(p, 8 * p.B * p.N))
  for (int64_t b = 0; b < p.B; ++b) softmax(p, b, static_cast<R*>(p.softmax) + b * p.N);
}

}  // namespace

void additive_forward(const AdditiveForward& p) {
  if (p.B == 0) return;
  by_activation(p, [&]<Activation ACT, class S, class R>() { scores<ACT, S, R>(p); });
  p.wide ? softmaxes<double>(p) : softmaxes<float>(p);
  by_dtype(p, p.values, [&]<class S, class R>() { contexts<S, R>(p); });
}

}  // namespace RECATTN_ISA
}  // namespace recattn
