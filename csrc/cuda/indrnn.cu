// IndRNN (Li et al., 2018) on an NVIDIA GPU: h[t] = act(x[t] + bias + weight_hh * h[t-1]).
//
// A thread owns one column (b, h), or two adjacent ones of a 16-bit type, and walks over time.
#include "indrnn.cuh"

namespace recattn {
namespace RECATTN_ISA {
namespace {

template <class E, Activation A, bool GATED>
__global__ void __launch_bounds__(THREADS) forward_kernel(const __grid_constant__ IndrnnForward p, int depth) {
  using Word = typename E::Word;
  constexpr int N = E::COLUMNS;
  char* const ring = shared_memory();
  const Columns<E, GATED> columns(p);
  if (!columns.exist(p)) return;

  float state[N], bias[N];
  for (int j = 0; j < N; ++j) {
    state[j] = load(p.h0, columns.first + j);
    bias[j] = load(p.bias, columns.h + j);
  }
  Walk<Word> out = columns.walk(p, p.output, p.reverse);
  Stream<Word, E::ASYNC, false> xs(columns.walk(p, p.x, p.reverse), p.T, ring, depth);
  auto resets = columns.resets(p, p.reverse);

  const auto take = [&](int64_t step, Word word, uint8_t reset) {
    const bool taken = !GATED || (p.reverse ? p.T - 1 - step : step) < columns.length;
    float x[N], output[N];
    E::unpack(word, x);
    for (int j = 0; j < N; ++j) {
      const float before = GATED && reset ? 0.0f : state[j];
      const float h = activate<A>(x[j] + bias[j] + columns.u[j] * before, p.negative_slope);
      output[j] = taken ? E::template inside<A>(h) : 0.0f;
      state[j] = taken ? h : state[j];
    }
    *out.at = E::pack(output);
    out.advance();
  };

#pragma unroll 1
  for (int i = 0; i < depth; ++i) {
    xs.copy();
    if (E::ASYNC) __pipeline_commit();
  }
  if (GATED) resets.copy();
  Word words[CHUNK];
  uint8_t reset[CHUNK] = {};
  for (int64_t step = 0; step < p.T; step += CHUNK) {
    if (E::ASYNC) wait_chunk(depth);
    xs.read(words);
    xs.copy();
    if (E::ASYNC) __pipeline_commit();
    if (GATED) {
      resets.read(reset);
      resets.copy();
    }
    if (step + CHUNK <= p.T) {
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) take(step + i, words[i], reset[i]);
    } else {
#pragma unroll
      for (int i = 0; i < CHUNK - 1; ++i) {
        if (step + i < p.T) take(step + i, words[i], reset[i]);
      }
    }
  }
  for (int j = 0; j < N; ++j) store(p.h_n, columns.first + j, state[j]);
}

// g[t] = clip(dy[t] + weight_hh * g[t+1]) * act'(h[t]);  dx = g;  dweight_hh = sum g[t] * h[t-1];  dbias = sum g
// The bound is one block: left to guess how many are wanted, the compiler spills a register for sm_80.
template <class E, Activation A, bool GATED>
__global__ void __launch_bounds__(THREADS, 1) backward_kernel(const __grid_constant__ IndrnnBackward p, int depth) {
  using Word = typename E::Word;
  constexpr int N = E::COLUMNS;
  char* const ring = shared_memory();
  const Columns<E, GATED> columns(p);
  if (!columns.exist(p)) return;

  float flow[N], start[N], h[N] = {}, du_part[N], db_part[N];  // flow = dL/dh[t] from the steps taken later
  for (int j = 0; j < N; ++j) {
    flow[j] = load(p.grad_h_n, columns.first + j);
    start[j] = load(p.h0, columns.first + j);
  }
  Sum du[N], db[N];
  Walk<Word> dx = columns.walk(p, p.grad_x, !p.reverse);
  // h[t-1] is read one step ahead of h[t], which it becomes: every value of output is loaded once.
  Walk<Word> h_walk = columns.walk(p, p.output, !p.reverse);
  if (p.T > 0) E::unpack(*h_walk.at, h);
  h_walk.advance();
  Stream<Word, E::ASYNC, false> hs(h_walk, p.T - 1, ring, depth);
  Stream<Word, E::ASYNC, true> dys(columns.walk(p, p.grad_output, !p.reverse), p.T, ring + depth * CHUNK_BYTES, depth);
  auto resets = columns.resets(p, !p.reverse);

  const auto take = [&](int64_t step, Word h_word, Word dy_word, uint8_t reset) {
    const bool taken = !GATED || (p.reverse ? step : p.T - 1 - step) < columns.length;
    const bool has_before = step + 1 < (GATED && p.reverse ? columns.length : p.T);
    float h_before[N], dy[N];
    E::unpack(h_word, h_before);
    E::unpack(dy_word, dy);
    for (int j = 0; j < N; ++j) {
      const float before = GATED && reset ? 0.0f : (has_before ? h_before[j] : start[j]);
      const float d = derivative<A>(h[j], p.negative_slope);
      const float g = times_derivative<A>(clamp_symmetric(dy[j] + flow[j], p.grad_clip), d);
      dy[j] = taken ? g : 0.0f;
      du_part[j] = taken ? du_part[j] + g * before : du_part[j];
      db_part[j] += dy[j];
      const float to_before = GATED && reset ? 0.0f : columns.u[j] * g;
      flow[j] = taken ? to_before : flow[j];
      h[j] = h_before[j];
    }
    *dx.at = E::pack(dy);
    dx.advance();
  };

#pragma unroll 1
  for (int i = 0; i < depth; ++i) {
    hs.copy();
    dys.copy();
    if (E::ASYNC) __pipeline_commit();
  }
  if (GATED) resets.copy();
  Word h_words[CHUNK], dy_words[CHUNK];
  uint8_t reset[CHUNK] = {};
  for (int64_t step = 0; step < p.T; step += CHUNK) {
    if (E::ASYNC) wait_chunk(depth);
    hs.read(h_words);
    dys.read(dy_words);
    hs.copy();
    dys.copy();
    if (E::ASYNC) __pipeline_commit();
    if (GATED) {
      resets.read(reset);
      resets.copy();
    }
    for (int j = 0; j < N; ++j) du_part[j] = db_part[j] = 0.0f;
    if (step + CHUNK < p.T) {
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) take(step + i, h_words[i], dy_words[i], reset[i]);
    } else {
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        if (step + i < p.T) take(step + i, h_words[i], dy_words[i], reset[i]);
      }
    }
    for (int j = 0; j < N; ++j) {
      du[j].add(du_part[j]);
      db[j].add(db_part[j]);
    }
  }
  for (int j = 0; j < N; ++j) {
    p.grad_columns[columns.first + j] = du[j].value();
    p.grad_columns[p.B * p.H + columns.first + j] = db[j].value();
    store(p.grad_h0, columns.first + j, flow[j]);
  }
}

constexpr int SUM_ROWS = 32, SUM_COLUMNS = 32;
using Partial = float[SUM_COLUMNS + 1];  // a column's numbers in different banks of shared memory

// Sums the rows' weight gradients, in an order that depends on the sizes alone. One warp a slice of the rows.
__global__ void __launch_bounds__(SUM_COLUMNS * SUM_ROWS) sum_rows_kernel(const __grid_constant__ IndrnnBackward p) {
  Partial* const partial = reinterpret_cast<Partial*>(shared_memory());
  const int64_t h = int64_t(blockIdx.x) * SUM_COLUMNS + threadIdx.x;
  const Plain to = blockIdx.y ? p.grad_bias : p.grad_weight_hh;
  const float* rows = p.grad_columns + blockIdx.y * p.B * p.H;
  Sum sum, total;
  if (h < p.H) {
#pragma unroll 4
    for (int64_t b = threadIdx.y; b < p.B; b += SUM_ROWS) sum.add(rows[b * p.H + h]);
  }
  partial[threadIdx.y][threadIdx.x] = sum.value();
  __syncthreads();
  if (threadIdx.y > 0 || h >= p.H) return;
  for (int i = 0; i < SUM_ROWS; ++i) total.add(partial[i][threadIdx.x]);
  store(to, h, total.value());
}

int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <class E, class P>
void launch_walk(void (*kernel)(P, int), const P& p, int streams, cudaStream_t stream, const char* what) {
  const int64_t threads = (p.B * p.H + E::COLUMNS - 1) / E::COLUMNS;
  if (threads == 0) return;
  const bool few = threads <= 192 * int64_t(multiprocessors());
  const int depth = E::ASYNC ? (few ? DEEP : SHALLOW) : 1;
  const size_t shared = E::ASYNC ? streams * depth * CHUNK_BYTES : 0;
  launch(kernel, dim3(unsigned((threads + THREADS - 1) / THREADS)), dim3(THREADS), shared, stream, what, p, depth);
}

}  // namespace
}  // namespace RECATTN_ISA

using namespace RECATTN_ISA;

void indrnn_forward(const IndrnnForward& p, cudaStream_t stream) {
  if (p.scan) return indrnn_forward_scan(p, stream);
  const bool gated = p.reset || p.lengths;
  by_element(p, paired(p, {&p.x, &p.output}), [&]<class E, Activation A>() {
    const auto kernel = gated || !E::ASYNC ? forward_kernel<E, A, true> : forward_kernel<E, A, !E::ASYNC>;
    launch_walk<E>(kernel, p, 1, stream, "indrnn: the forward kernel");
  });
}

void indrnn_backward(const IndrnnBackward& p, cudaStream_t stream) {
  const bool gated = p.reset || p.lengths;
  const auto walk = [&]<class E, Activation A>() {
    const auto kernel = gated || !E::ASYNC ? backward_kernel<E, A, true> : backward_kernel<E, A, !E::ASYNC>;
    launch_walk<E>(kernel, p, 2, stream, "indrnn: the backward kernel");
  };
  if (p.scan) {
    indrnn_backward_scan(p, stream);
  } else {
    by_element(p, paired(p, {&p.grad_output, &p.output, &p.grad_x}), walk);
  }
  if (p.H == 0) return;
  const dim3 grid(unsigned((p.H + SUM_COLUMNS - 1) / SUM_COLUMNS), 2), block(SUM_COLUMNS, SUM_ROWS);
  launch(sum_rows_kernel, grid, block, sizeof(Partial[SUM_ROWS]), stream, "indrnn: the sum over the batch", p);
}

}  // namespace recattn
