// IndRNN over time in parallel: for few long columns, which one thread each cannot bring a GPU to speed.
//
// A step of relu, relu6, hardtanh or identity takes the state f to clamp(slope * f + c, low, high), and so does a chain
// of steps, whatever the sign of the slopes; for the backward that holds for every activation. A block has 32 lanes of
// columns and takes tiles of CHUNKS * STEPS steps of them, one after the other, a chunk of STEPS steps a warp:
//
//   1. each thread composes its steps into one such map;
//   2. applied in order to the state before the tile, the maps of the earlier warps give the state before its chunk;
//   3. it takes its steps from there.
//
// Every value is read once and written once. Where a map is not finite (an overflow, NaN or infinity in the data), the
// chunks of the tile are walked one after the other. recattn_kernels/ops/indrnn/scan.py is the same in plain PyTorch.
#include "indrnn.cuh"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr int CHUNKS = 8;  // warps of a block
constexpr int FORWARD_STEPS = 16, BACKWARD_STEPS = 8;  // the backward keeps three numbers of each step, the forward one
constexpr float INF = __builtin_inff();
enum Field { A_, E_, C_, LOW, HIGH, FIELDS };

// f -> clamp((a + e) f + c, low, high). e is what the product of the slopes lost in rounding: alike in every tile, it
// would add up over a long sequence.
struct Map {
  float a = 1.0f, e = 0.0f, c = 0.0f, low = -INF, high = INF;

  __device__ void scale(float slope) {
    const float p = slope * a;
    e = fmaf(slope, a, -p) + slope * e;
    a = p;
  }
  __device__ void forget() { a = e = 0.0f; }
};

// slope * end of an end that may be infinite: a slope of 0 forgets it.
__device__ inline float end_of(float slope, float end) { return slope == 0.0f ? 0.0f : slope * end; }

// Between the warps of a block.
template <int N>
struct Exchange {
  float maps[CHUNKS][FIELDS][N][32];
  float ends[CHUNKS][N][32];

  // From the map of each chunk and the state before the tile, the state before each chunk; false: not to be trusted.
  __device__ bool starts(const Map (&map)[N], const float (&state)[N], float (&start)[N]) {
    const int chunk = threadIdx.y, lane = threadIdx.x;
    for (int j = 0; j < N; ++j) {
      maps[chunk][A_][j][lane] = map[j].a;
      maps[chunk][E_][j][lane] = map[j].e;
      maps[chunk][C_][j][lane] = map[j].c;
      maps[chunk][LOW][j][lane] = map[j].low;
      maps[chunk][HIGH][j][lane] = map[j].high;
    }
    __syncthreads();
    bool trusted = true;
    for (int j = 0; j < N; ++j) {
      float f = state[j];
      for (int k = 0; k < chunk; ++k) {
        const float line = fmaf(maps[k][A_][j][lane], f, fmaf(maps[k][E_][j][lane], f, maps[k][C_][j][lane]));
        // The ends of a negative slope are the other way round.
        const float p = maps[k][LOW][j][lane], q = maps[k][HIGH][j][lane];
        const float low = p > q ? q : p, high = p > q ? p : q;
        trusted = trusted && fabsf(line) < INF && low <= high;
        f = line < low ? low : (line > high ? high : line);
      }
      start[j] = f;
    }
    return !__syncthreads_or(!trusted);
  }

  // From where each chunk ends, what the next one starts from, chunk 0 from the state before the tile; and the state
  // after the tile.
  __device__ void pass(const float (&end)[N], const float (&state)[N], float (&start)[N], float (&after)[N]) {
    const int chunk = threadIdx.y, lane = threadIdx.x;
    for (int j = 0; j < N; ++j) ends[chunk][j][lane] = end[j];
    __syncthreads();
    for (int j = 0; j < N; ++j) {
      start[j] = chunk == 0 ? state[j] : ends[chunk - 1][j][lane];
      after[j] = ends[CHUNKS - 1][j][lane];
    }
    __syncthreads();
  }
};

// A thread's own steps of a sequence, a tile ahead: one chunk of each tile.
template <class Word, int STEPS>
struct Ahead {
  Walk<Word> walk;
  int64_t left;  // steps from here to the end of the sequence
  Word words[STEPS] = {};

  __device__ Ahead(Walk<Word> from, int64_t steps) : walk(from), left(steps - int64_t(threadIdx.y) * STEPS) {
    if (walk.at != nullptr) walk.advance(int64_t(threadIdx.y) * STEPS);
    load();
  }
  __device__ void read(Word (&into)[STEPS]) {
#pragma unroll
    for (int i = 0; i < STEPS; ++i) into[i] = words[i];
    left -= CHUNKS * STEPS;
    load();
  }

 private:
  __device__ void load() {
    if (walk.at == nullptr) return;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      if (i < left) words[i] = *walk.at;
      walk.advance();
    }
    walk.advance((CHUNKS - 1) * STEPS);
  }
};

// The steps that are within a row's length, in the order in which they are taken.
struct Range {
  int64_t begin, end;
  __device__ Range(int64_t length, int64_t T, bool backwards)
      : begin(backwards ? T - length : 0), end(backwards ? T : length) {}
  __device__ bool has(int64_t step) const { return step >= begin && step < end; }
};

template <class E, Activation A>
__global__ void __launch_bounds__(32 * CHUNKS) forward_scan_kernel(const __grid_constant__ IndrnnForward p) {
  using Word = typename E::Word;
  constexpr int N = E::COLUMNS, STEPS = FORWARD_STEPS;
  Exchange<N>& exchange = *reinterpret_cast<Exchange<N>*>(shared_memory());
  Columns<E, true> columns(p);
  const bool exist = columns.exist(p);
  if (!exist) columns.none();
  const int64_t steps = exist ? p.T : 0;  // a thread without a column keeps step with the others, on nothing
  const Range valid(columns.length, p.T, p.reverse);

  float state[N] = {}, bias[N] = {}, start[N], end[N];
  if (exist) {
    for (int j = 0; j < N; ++j) {
      state[j] = load(p.h0, columns.first + j);
      bias[j] = load(p.bias, columns.h + j);
    }
  }
  Ahead<Word, STEPS> xs(columns.walk(p, p.x, p.reverse), steps);
  Ahead<uint8_t, STEPS> resets(columns.reset_walk(p, p.reverse), steps);
  Walk<Word> out = columns.walk(p, p.output, p.reverse);
  out.advance(int64_t(threadIdx.y) * STEPS);

#pragma unroll 1
  for (int64_t step = int64_t(threadIdx.y) * STEPS, tile = 0; tile < p.T; tile += CHUNKS * STEPS, step += CHUNKS * STEPS) {
    Word words[STEPS];
    uint8_t reset[STEPS];
    xs.read(words);
    resets.read(reset);
    Map map[N];
    float v[STEPS][N];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      E::unpack(words[i], v[i]);
      if (!valid.has(step + i)) continue;
      for (int j = 0; j < N; ++j) {
        const float u = columns.u[j];
        v[i][j] += bias[j];
        map[j].scale(u);
        if (reset[i]) map[j].forget();
        map[j].c = v[i][j] + (reset[i] ? 0.0f : u * map[j].c);
        if constexpr (A != Activation::identity) {
          map[j].low = activate<A>(v[i][j] + (reset[i] ? 0.0f : end_of(u, map[j].low)), p.negative_slope);
          map[j].high = activate<A>(v[i][j] + (reset[i] ? 0.0f : end_of(u, map[j].high)), p.negative_slope);
        }
      }
    }
    const auto run = [&](auto&& take) {
      for (int j = 0; j < N; ++j) end[j] = start[j];
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        const bool taken = valid.has(step + i);
        float output[N];
        for (int j = 0; j < N; ++j) {
          const float h = activate<A>(v[i][j] + columns.u[j] * (reset[i] ? 0.0f : end[j]), p.negative_slope);
          output[j] = taken ? E::template inside<A>(h) : 0.0f;
          end[j] = taken ? h : end[j];
        }
        take(i, output);
      }
    };
    float after[N];
    if (!exchange.starts(map, state, start)) {
      // Chunk 0 starts right, and each round makes one chunk more do so.
      for (int j = 0; j < N; ++j) start[j] = state[j];
#pragma unroll 1
      for (int k = 1; k < CHUNKS; ++k) {
        run([](int, const float (&)[N]) {});
        exchange.pass(end, state, start, after);
      }
    }
    run([&](int i, const float (&output)[N]) {
      if (step + i < steps) *out.at = E::pack(output);
      out.advance();
    });
    out.advance((CHUNKS - 1) * STEPS);
    exchange.pass(end, state, start, after);
    for (int j = 0; j < N; ++j) state[j] = after[j];
  }
  if (exist && threadIdx.y == 0) {
    for (int j = 0; j < N; ++j) store(p.h_n, columns.first + j, state[j]);
  }
}

// g[t] = clip(dy[t] + weight_hh * g[t+1]) * act'(h[t]);  dx = g;  dweight_hh = sum g[t] * h[t-1];  dbias = sum g
template <class E, Activation A>
__global__ void __launch_bounds__(32 * CHUNKS) backward_scan_kernel(const __grid_constant__ IndrnnBackward p) {
  using Word = typename E::Word;
  constexpr int N = E::COLUMNS, STEPS = BACKWARD_STEPS;
  Exchange<N>& exchange = *reinterpret_cast<Exchange<N>*>(shared_memory());
  Columns<E, true> columns(p);
  const bool exist = columns.exist(p), clipped = p.grad_clip < INF;
  if (!exist) columns.none();
  const int64_t steps = exist ? p.T : 0;
  const Range valid(columns.length, p.T, !p.reverse);

  float state[N] = {}, h0[N] = {}, start[N], end[N];  // state: dL/dh from the steps taken later
  Sum du[N], db[N];
  if (exist) {
    for (int j = 0; j < N; ++j) {
      state[j] = load(p.grad_h_n, columns.first + j);
      h0[j] = load(p.h0, columns.first + j);
    }
  }
  Walk<Word> h_walk = columns.walk(p, p.output, !p.reverse);
  Ahead<Word, STEPS> hs(h_walk, steps);
  // h[t-1] of a chunk's last step is the first of the next chunk, which another thread has: it is read again.
  h_walk.advance(int64_t(threadIdx.y + 1) * STEPS);
  Ahead<Word, STEPS> dys(columns.walk(p, p.grad_output, !p.reverse), steps);
  Ahead<uint8_t, STEPS> resets(columns.reset_walk(p, !p.reverse), steps);
  Walk<Word> dx = columns.walk(p, p.grad_x, !p.reverse);
  dx.advance(int64_t(threadIdx.y) * STEPS);

#pragma unroll 1
  for (int64_t step = int64_t(threadIdx.y) * STEPS, tile = 0; tile < p.T; tile += CHUNKS * STEPS, step += CHUNKS * STEPS) {
    Word h_words[STEPS + 1], dy_words[STEPS];
    uint8_t reset[STEPS];
    h_words[STEPS] = step + STEPS < steps ? *h_walk.at : Word(0);
    h_walk.advance(CHUNKS * STEPS);
    hs.read(reinterpret_cast<Word(&)[STEPS]>(h_words));
    dys.read(dy_words);
    resets.read(reset);
    Map map[N];
    float d[STEPS][N];  // act'(h[t])
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      float h[N], dy[N];
      E::unpack(h_words[i], h);
      E::unpack(dy_words[i], dy);
      for (int j = 0; j < N; ++j) d[i][j] = derivative<A>(h[j], p.negative_slope);
      if (!valid.has(step + i)) continue;
      for (int j = 0; j < N; ++j) {
        const float slope = columns.u[j] * d[i][j];
        map[j].scale(slope);
        map[j].c = columns.u[j] * times_derivative<A>(dy[j] + map[j].c, d[i][j]);
        if (clipped) {
          map[j].low = slope * clamp_symmetric(dy[j] + map[j].low, p.grad_clip);
          map[j].high = slope * clamp_symmetric(dy[j] + map[j].high, p.grad_clip);
        }
        if (reset[i]) {
          map[j].forget();
          map[j].c = 0.0f;
          if (clipped) map[j].low = map[j].high = 0.0f;
        }
      }
    }
    const auto run = [&](auto&& take) {
      for (int j = 0; j < N; ++j) end[j] = start[j];
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        const bool taken = valid.has(step + i);
        float g[N];
        E::unpack(dy_words[i], g);
        for (int j = 0; j < N; ++j) {
          g[j] = times_derivative<A>(clamp_symmetric(g[j] + end[j], p.grad_clip), d[i][j]);
          g[j] = taken ? g[j] : 0.0f;
          end[j] = taken ? (reset[i] ? 0.0f : columns.u[j] * g[j]) : end[j];
        }
        take(i, taken, g);
      }
    };
    float after[N];
    if (!exchange.starts(map, state, start)) {
      // Chunk 0 starts right, and each round makes one chunk more do so.
      for (int j = 0; j < N; ++j) start[j] = state[j];
#pragma unroll 1
      for (int k = 1; k < CHUNKS; ++k) {
        run([](int, bool, const float (&)[N]) {});
        exchange.pass(end, state, start, after);
      }
    }
    float du_part[N] = {}, db_part[N] = {};
    run([&](int i, bool taken, const float (&g)[N]) {
      float before[N];
      E::unpack(h_words[i + 1], before);
      for (int j = 0; j < N; ++j) {
        // The last step taken has h0 before it.
        before[j] = reset[i] ? 0.0f : (step + i + 1 < valid.end ? before[j] : h0[j]);
        du_part[j] = taken ? du_part[j] + g[j] * before[j] : du_part[j];
        db_part[j] += g[j];
      }
      if (step + i < steps) *dx.at = E::pack(g);
      dx.advance();
    });
    dx.advance((CHUNKS - 1) * STEPS);
    exchange.pass(end, state, start, after);
    for (int j = 0; j < N; ++j) {
      state[j] = after[j];
      du[j].add(du_part[j]);
      db[j].add(db_part[j]);
    }
  }

  // The chunks' weight gradients, summed in their order.
  const auto sum = [&](const Sum (&sums)[N], float* columns_of) {
    float mine[N], unused[N], none[N] = {};
    for (int j = 0; j < N; ++j) mine[j] = sums[j].value();
    exchange.pass(mine, none, unused, unused);
    if (!exist || threadIdx.y > 0) return;
    for (int j = 0; j < N; ++j) {
      Sum total;
      for (int k = 0; k < CHUNKS; ++k) total.add(exchange.ends[k][j][threadIdx.x]);
      columns_of[columns.first + j] = total.value();
    }
  };
  sum(du, p.grad_columns);
  __syncthreads();
  sum(db, p.grad_columns + p.B * p.H);
  if (exist && threadIdx.y == 0) {
    for (int j = 0; j < N; ++j) store(p.grad_h0, columns.first + j, state[j]);
  }
}

template <class E, class P>
void launch_scan(void (*kernel)(P), const P& p, cudaStream_t stream, const char* what) {
  const int64_t columns = p.B * p.H, block = 32 * E::COLUMNS;
  if (columns == 0) return;
  const dim3 grid(unsigned((columns + block - 1) / block));
  launch(kernel, grid, dim3(32, CHUNKS), sizeof(Exchange<E::COLUMNS>), stream, what, p);
}

}  // namespace
}  // namespace RECATTN_ISA

using namespace RECATTN_ISA;

void indrnn_forward_scan(const IndrnnForward& p, cudaStream_t stream) {
  by_element(p, paired(p, {&p.x, &p.output}), [&]<class E, Activation A>() {
    if constexpr (A == Activation::relu || A == Activation::relu6 || A == Activation::hardtanh || A == Activation::identity) {
      launch_scan<E>(forward_scan_kernel<E, A>, p, stream, "indrnn: the forward scan");
    }
  });
}

void indrnn_backward_scan(const IndrnnBackward& p, cudaStream_t stream) {
  by_element(p, paired(p, {&p.grad_output, &p.output, &p.grad_x}), [&]<class E, Activation A>() {
    launch_scan<E>(backward_scan_kernel<E, A>, p, stream, "indrnn: the backward scan");
  });
}

}  // namespace recattn
