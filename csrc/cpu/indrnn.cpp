// IndRNN (Li et al., 2018) on the CPU: h[t] = act(x[t] + bias + weight_hh * h[t-1]), one pass over memory each way.
//
// Columns (b, h) are independent. A task is a tile of columns small enough that its state stays in the first-level
// cache; it walks over time, so x and output stream through once. Tiles go to threads, columns to vector lanes. From one
// step to the next a tile jumps over the columns of the others, where the hardware's prefetchers do not follow, so each
// step asks for the rows of the next one: measured, a third less time.
#include "ahead.h"
#include "rows.h"
#include "streaming.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr int64_t TILE = 2048;  // columns
constexpr int64_t CHUNK = 128;  // elements of a row worked on at a time, so that fetching, arithmetic and storing overlap

// A sum over time is one of sums over so many steps: its error does not grow with T.
constexpr int64_t SUM_STEPS = 64;

// Rows of the batch and a range of the hidden dimension.
struct Tile {
  int64_t b0, b1, h0, width;
};

// Cuts (B, H) into tiles of about TILE columns, as many for every thread. Cuts along H fall on multiples of 64 elements:
// a cache line belongs to one thread.
struct Tiling {
  int64_t B, H, rows = 1, width = 1, across = 0;
  explicit Tiling(const Indrnn& p) : B(p.B), H(p.H) {
    if (B * H == 0) return;
    const int64_t tiles = ceil_div(ceil_div(B * H, TILE), p.threads) * p.threads;
    rows = ceil_div(B, tiles);
    width = tiles <= B ? H : least(H, ceil_div(ceil_div(H, ceil_div(tiles, B)), 64) * 64);
    across = ceil_div(H, width);
  }
  int64_t count() const { return ceil_div(B, rows) * across; }
  Tile operator[](int64_t i) const {
    const int64_t b = i / across * rows, h = i % across * width;
    return {b, least(B, b + rows), h, least(width, H - h)};
  }
};

template <class S>
S* row(const Sequence& s, int64_t t, int64_t b, int64_t h) {
  return s.data ? static_cast<S*>(s.data) + t * s.stride_t + b * s.stride_b + h : nullptr;
}

inline bool ended(const Indrnn& p, int64_t t, int64_t b) { return p.lengths && t >= p.lengths[b]; }

template <class S>
bool streams(const Indrnn& p, const Sequence& to) {
  const int64_t element = sizeof(S);
  return p.T * p.B * p.H * element >= STREAM_FROM && whole_lines(to.data, (to.stride_t | to.stride_b | p.H) * element);
}

// Part of a row in the type that it is computed in: itself, or a copy in `buffer`.
template <class S, class R>
const R* wide(const S* from, R* buffer, int64_t n) {
  if constexpr (std::is_same_v<S, R>) {
    return from;
  } else {
    widen(buffer, from, n);
    return buffer;
  }
}

// One step of one row: h = act(x + bias + u * h). S: what out is to be stored as.
template <Activation A, bool BIAS, class S, class R>
RECATTN_FN void forward_row(const R* __restrict x, R* __restrict out, R* __restrict h, const R* __restrict u,
                            const R* __restrict bias, R slope, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    R v = x[i];
    if constexpr (BIAS) v += bias[i];
    v = activate<A>(v + u[i] * h[i], slope);
    h[i] = v;
    if constexpr (sizeof(S) == 2) v = keep_inside<A, S>(v);
    out[i] = v;
  }
}

template <Activation A, bool BIAS, class S>
void forward_tile(const IndrnnForward& p, Tile tile) {
  using R = typename Compute<S>::type;
  const R* u = static_cast<const R*>(p.weight_hh) + tile.h0;
  const R* bias = BIAS ? static_cast<const R*>(p.bias) + tile.h0 : nullptr;
  const R slope = R(p.negative_slope);
  const auto state = [&](int64_t b) { return static_cast<R*>(p.h_n) + b * p.H + tile.h0; };
  const int64_t ahead = p.reverse ? -1 : 1;
  const bool stream = streams<S>(p, p.output);
  constexpr bool NARROW = !std::is_same_v<S, R>;
  alignas(64) S line[CHUNK];
  alignas(64) R in[CHUNK], wide_out[CHUNK];
  for (int64_t b = tile.b0; b < tile.b1; ++b) copy_or_zero(state(b), p.h0, b * p.H + tile.h0, tile.width);
  const bool interrupted = p.lengths || p.reset.data;
  const int64_t width = tile.width, x_ahead = ahead * p.x.stride_t, out_ahead = ahead * p.output.stride_t;
  const int64_t x_b = p.x.stride_b, out_b = p.output.stride_b;
  // A part of a row of a constant length: the compiler unrolls its loops.
  const auto part = [&](const S* x, S* out, R* h, int64_t i, int64_t n) __attribute__((always_inline)) {
    fetch<0, 3>(x + i + x_ahead, n * sizeof(S));
    if (!stream) fetch<1, 3>(out + i + out_ahead, n * sizeof(S));
    S* to = stream ? line : out + i;
    R* row_out = wide_out;
    if constexpr (!NARROW) row_out = to;
    forward_row<A, BIAS, S>(wide(x + i, in, n), row_out, h + i, u + i, BIAS ? bias + i : nullptr, slope, n);
    if constexpr (NARROW) narrow(to, wide_out, n);
    if (stream) stream_row(out + i, line, n);
  };
  for (int64_t step = 0; step < p.T; ++step) {
    const int64_t t = p.reverse ? p.T - 1 - step : step;
    const S* x = row<S>(p.x, t, tile.b0, tile.h0);
    S* out = row<S>(p.output, t, tile.b0, tile.h0);
    R* h = state(tile.b0);
    for (int64_t b = tile.b0; b < tile.b1; ++b, x += x_b, out += out_b, h += p.H) {
      if (interrupted) {
        if (ended(p, t, b)) {
          memset(static_cast<void*>(out), 0, width * sizeof(S));
          continue;
        }
        if (resets(p, t, b)) memset(h, 0, width * sizeof(R));
      }
      int64_t i = 0;
      for (; i + CHUNK <= width; i += CHUNK) part(x, out, h, i, CHUNK);
      if (i < width) part(x, out, h, i, width - i);
    }
  }
  if (stream) end_streaming();
}

// Adds the sums over some steps to those over all of them, keeps what rounding loses of that, and starts anew.
template <class R>
void fold(R* __restrict total, R* __restrict lost, R* __restrict part, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const R after = total[i] + part[i], came = after - total[i];
    lost[i] += (total[i] - (after - came)) + (part[i] - came);
    total[i] = after;
    part[i] = R(0);
  }
}

template <class R>
void add_lost(R* __restrict total, const R* __restrict lost, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] = total[i] - total[i] == R(0) ? total[i] + lost[i] : total[i];  // if finite
}

// One step of one row, with prev = h[t-1] and flow = dL/dh[t] from later steps:
// g = clip(dy + flow) * act'(h);  dx = g;  du += g * prev;  db += g;  flow = u * g.
template <Activation A, bool DY, bool PREV, class R>
void backward_row(const R* __restrict dy, const R* __restrict h, const R* __restrict prev, R* __restrict dx,
                  R* __restrict flow, R* __restrict du, R* __restrict db, const R* __restrict u, R clip, R slope,
                  int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    R g = flow[i];
    if constexpr (DY) g += dy[i];
    g = times_derivative<A>(clamp_symmetric(g, clip), derivative<A>(h[i], slope));
    dx[i] = g;
    du[i] += g * (PREV ? prev[i] : R(0));  // 0 times NaN is NaN
    db[i] += g;
    flow[i] = u[i] * g;
  }
}

template <Activation A, bool DY, class S>
void backward_tile(const IndrnnBackward& p, Tile tile) {
  using R = typename Compute<S>::type;
  const R* u = static_cast<const R*>(p.weight_hh) + tile.h0;
  const R clip = R(p.grad_clip), slope = R(p.negative_slope);
  const auto columns = [&](void* data, int64_t b) { return static_cast<R*>(data) + b * p.H + tile.h0; };
  const auto sums = [&](int which, int64_t b) {
    return static_cast<R*>(p.grad_columns) + (which * p.B + b) * p.H + tile.h0;
  };
  for (int64_t b = tile.b0; b < tile.b1; ++b) {
    copy_or_zero(columns(p.grad_h0, b), p.grad_h_n, b * p.H + tile.h0, tile.width);
    for (int which = 0; which < 6; ++which) memset(sums(which, b), 0, tile.width * sizeof(R));
  }
  const int64_t back = p.reverse ? 1 : -1;  // where the step taken before lies
  const bool stream = streams<S>(p, p.grad_x);
  constexpr bool NARROW = !std::is_same_v<S, R>;
  alignas(64) S line[CHUNK];
  alignas(64) R wide_dy[CHUNK], wide_h[CHUNK], wide_prev[CHUNK], wide_dx[CHUNK];
  for (int64_t step = 0; step < p.T; ++step) {
    const int64_t t = p.reverse ? step : p.T - 1 - step;
    for (int64_t b = tile.b0; b < tile.b1; ++b) {
      S* dx = row<S>(p.grad_x, t, b, tile.h0);
      if (ended(p, t, b)) {
        memset(static_cast<void*>(dx), 0, tile.width * sizeof(S));
        continue;
      }
      const S* dy = row<S>(p.grad_output, t, b, tile.h0);
      const S* h = row<S>(p.output, t, b, tile.h0);
      R *flow = columns(p.grad_h0, b), *du = sums(2, b), *db = sums(3, b);
      const bool fresh = resets(p, t, b);
      const int64_t before = t + back;
      const S* prev = nullptr;
      const R* start = nullptr;
      if (!fresh && before >= 0 && before < p.T && !ended(p, before, b)) {
        prev = row<S>(p.output, before, b, tile.h0);
      } else if (!fresh && p.h0) {
        start = static_cast<const R*>(p.h0) + b * p.H + tile.h0;
      }
      for (int64_t i = 0; i < tile.width; i += CHUNK) {
        const int64_t n = least(CHUNK, tile.width - i);
        if (DY) fetch<0, 3>(dy + i + back * p.grad_output.stride_t, n * sizeof(S));
        fetch<0, 3>(h + i + 2 * back * p.output.stride_t, n * sizeof(S));  // h[t-1] is read in this step
        if (!stream) fetch<1, 3>(dx + i + back * p.grad_x.stride_t, n * sizeof(S));
        S* to = stream ? line : dx + i;
        R* row_dx = wide_dx;
        if constexpr (!NARROW) row_dx = to;
        const R* dy_i = DY ? wide(dy + i, wide_dy, n) : nullptr;
        const R* h_i = wide(h + i, wide_h, n);
        const R* prev_i = prev ? wide(prev + i, wide_prev, n) : start ? start + i : nullptr;
        if (prev_i) {
          backward_row<A, DY, true>(dy_i, h_i, prev_i, row_dx, flow + i, du + i, db + i, u + i, clip, slope, n);
        } else {
          backward_row<A, DY, false>(dy_i, h_i, prev_i, row_dx, flow + i, du + i, db + i, u + i, clip, slope, n);
        }
        if constexpr (NARROW) narrow(to, wide_dx, n);
        if (stream) stream_row(dx + i, line, n);
      }
      if (fresh) memset(flow, 0, tile.width * sizeof(R));
    }
    if (step % SUM_STEPS == SUM_STEPS - 1 || step == p.T - 1) {
      for (int64_t b = tile.b0; b < tile.b1; ++b) {
        fold(sums(0, b), sums(4, b), sums(2, b), tile.width);
        fold(sums(1, b), sums(5, b), sums(3, b), tile.width);
      }
    }
  }
  for (int64_t b = tile.b0; b < tile.b1; ++b) {
    add_lost(sums(0, b), sums(4, b), tile.width);
    add_lost(sums(1, b), sums(5, b), tile.width);
  }
  if (stream) end_streaming();
}

// Sums the rows' weight gradients in the order of the batch, whatever the number of threads.
template <class R>
void reduce_rows(const IndrnnBackward& p) {
  for (int which = 0; which < 2; ++which) {
    const R* columns = static_cast<const R*>(p.grad_columns) + which * p.B * p.H;
    R* to = static_cast<R*>(which ? p.grad_bias : p.grad_weight_hh);
#pragma omp parallel for num_threads(p.threads) if (p.B * p.H > 65536)
    for (int64_t h0 = 0; h0 < p.H; h0 += 256) {
      const int64_t n = least(256, p.H - h0);
      double sums[256] = {};  // a float would lose digits over a large batch
      for (int64_t b = 0; b < p.B; ++b) {
        for (int64_t i = 0; i < n; ++i) sums[i] += double(columns[b * p.H + h0 + i]);
      }
      for (int64_t i = 0; i < n; ++i) to[h0 + i] = R(sums[i]);
    }
  }
}

// Below this many elements a thread costs more than it brings.
inline int threads_for(const Indrnn& p) { return p.T * p.B * p.H < 16384 ? 1 : p.threads; }

template <Activation A, class S>
void forward(const IndrnnForward& p) {
  const Tiling tiling(p);
#pragma omp parallel for schedule(static) num_threads(threads_for(p))
  for (int64_t i = 0; i < tiling.count(); ++i) {
    p.bias ? forward_tile<A, true, S>(p, tiling[i]) : forward_tile<A, false, S>(p, tiling[i]);
  }
}

template <Activation A, class S>
void backward(const IndrnnBackward& p) {
  const Tiling tiling(p);
#pragma omp parallel for schedule(static) num_threads(threads_for(p))
  for (int64_t i = 0; i < tiling.count(); ++i) {
    p.grad_output.data ? backward_tile<A, true, S>(p, tiling[i]) : backward_tile<A, false, S>(p, tiling[i]);
  }
  reduce_rows<typename Compute<S>::type>(p);
}

template <class S, class F>
void by_activation(Activation a, F f) {
  switch (a) {
    case Activation::relu: return f.template operator()<Activation::relu, S>();
    case Activation::tanh: return f.template operator()<Activation::tanh, S>();
    case Activation::sigmoid: return f.template operator()<Activation::sigmoid, S>();
    case Activation::identity: return f.template operator()<Activation::identity, S>();
    case Activation::leaky_relu: return f.template operator()<Activation::leaky_relu, S>();
    case Activation::relu6: return f.template operator()<Activation::relu6, S>();
    case Activation::hardtanh: return f.template operator()<Activation::hardtanh, S>();
  }
}

template <class F>
void by_dtype(const Indrnn& p, F f) {
  switch (p.dtype) {
    case Dtype::float32: return by_activation<float>(p.activation, f);
    case Dtype::float64: return by_activation<double>(p.activation, f);
    case Dtype::bfloat16: return by_activation<BFloat16>(p.activation, f);
    case Dtype::float16: return by_activation<Float16>(p.activation, f);
  }
}

}  // namespace

void indrnn_forward(const IndrnnForward& p) {
  by_dtype(p, [&]<Activation A, class S>() { forward<A, S>(p); });
}

void indrnn_backward(const IndrnnBackward& p) {
  by_dtype(p, [&]<Activation A, class S>() { backward<A, S>(p); });
}

}  // namespace RECATTN_ISA
}  // namespace recattn
