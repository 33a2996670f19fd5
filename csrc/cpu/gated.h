// What the forward and the backward of the gated cells (rnn, lstm, gru) share: the order of the steps, where the rows
// of their tensors lie, and how the work is divided over threads.
#pragma once

#include "panels.h"
#include "rows.h"
#include "workspace.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr int gates_of(Cell c) {
  return c == Cell::lstm ? 4 : c == Cell::gru || c == Cell::gru_before ? 3 : 1;
}

// How many values are kept for the backward.
constexpr int kept_of(Cell c) { return c == Cell::gru ? 4 : gates_of(c); }

constexpr double LAYER_NORM_EPS = 1e-5;

// Row b is at its step number `taken` (from 0) at time t, if it has so many: lengths, and reverse, are only this.
[[maybe_unused]] inline int64_t steps_of(const Gated& p, int64_t b) {
  if (!p.lengths) return p.T;
  return p.lengths[b] < 0 ? 0 : least(p.lengths[b], p.T);
}
[[maybe_unused]] inline int64_t taken_before(const Gated& p, int64_t t, int64_t b) {
  return p.reverse ? steps_of(p, b) - 1 - t : t;
}

[[maybe_unused]] inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// Where row b of step t is: its number in what has no gaps, its first element in a sequence, and its memory.
RECATTN_FN int64_t row_of(const Gated& p, int64_t t, int64_t b) { return p.starts ? p.starts[t] + b : t * p.B + b; }
RECATTN_FN int64_t offset(const Gated& p, const Sequence& s, int64_t t, int64_t b) {
  return p.starts ? row_of(p, t, b) * s.stride_b : t * s.stride_t + b * s.stride_b;
}
RECATTN_FN void* place(const Gated& p, const Sequence& s, int64_t t, int64_t b, int64_t element = 0) {
  return static_cast<char*>(s.data) + (offset(p, s, t, b) + element) * size_of(p.dtype);
}

// n elements of a sequence in the type that they are computed in: themselves, or a copy in `buffer`.
template <class R>
RECATTN_FN const R* widened(Dtype dtype, const void* from, R* buffer, int64_t n) {
  if constexpr (std::is_same_v<R, float>) {
    if (dtype == Dtype::bfloat16) return widen(buffer, static_cast<const BFloat16*>(from), n), buffer;
    if (dtype == Dtype::float16) return widen(buffer, static_cast<const Float16*>(from), n), buffer;
  }
  return static_cast<const R*>(from);
}

template <class R>
RECATTN_FN void narrowed(Dtype dtype, void* to, const R* from, int64_t n) {
  if constexpr (std::is_same_v<R, float>) {
    if (dtype == Dtype::bfloat16) return narrow(static_cast<BFloat16*>(to), from, n);
    if (dtype == Dtype::float16) return narrow(static_cast<Float16*>(to), from, n);
  }
  memcpy(to, from, n * sizeof(R));
}

// The masks of zoneout, or their rates: where a state stays, and by what share.
struct Zoneout {
  Mask keep;
  double rate;

  bool on() const { return keep.data || rate != 0; }

  // next = keep ? prev : next, or rate * prev + (1 - rate) * next
  template <class R>
  RECATTN_FN void mix(int64_t t, int64_t b, int64_t j, const R* prev, R* next, int64_t n) const {
    if (keep.data) {
      const uint8_t* mask = keep.data + t * keep.stride_t + b * keep.stride_b + j;
      RECATTN_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) next[i] = mask[i] ? prev[i] : next[i];
    } else if (rate != 0) {
      const R share = R(rate);
      RECATTN_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) next[i] = share * prev[i] + (R(1) - share) * next[i];
    }
  }

  // Of the gradient of what mix() left, the share of prev goes to `stays`; that of next stays in grad.
  template <class R>
  RECATTN_FN void split(int64_t t, int64_t b, int64_t j, R* grad, R* stays, int64_t n) const {
    if (keep.data) {
      const uint8_t* mask = keep.data + t * keep.stride_t + b * keep.stride_b + j;
      RECATTN_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        const R g = grad[i];
        stays[i] = mask[i] ? g : R(0);
        grad[i] = mask[i] ? R(0) : g;
      }
    } else if (rate != 0) {
      const R share = R(rate);
      RECATTN_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        stays[i] = share * grad[i];
        grad[i] = (R(1) - share) * grad[i];
      }
    } else {
      memset(stays, 0, n * sizeof(R));
    }
  }
};

[[maybe_unused]] inline Zoneout zoneout_h(const Gated& p) { return {p.keep_h, p.zoneout_h}; }
[[maybe_unused]] inline Zoneout zoneout_c(const Gated& p) { return {p.keep_c, p.zoneout_c}; }

// sum of f(i) for i < n, over as many sums at once as vectorise.
template <class R, class F>
RECATTN_FN R sum_of(int64_t n, F f) {
  constexpr int WIDTH = 4 * LANES<R>;
  R sums[WIDTH] = {}, sum = 0;
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    for (int lane = 0; lane < WIDTH; ++lane) sums[lane] += f(i + lane);
  }
  for (; i < n; ++i) sum += f(i);
  for (int lane = 0; lane < WIDTH; ++lane) sum += sums[lane];
  return sum;
}

// normed = (v - mean) * rstd, which is returned. normed may be v.
template <class R>
R normalise(const R* v, R* normed, int64_t n) {
  const R mean = sum_of<R>(n, [&](int64_t i) { return v[i]; }) / R(n);
  const R variance = sum_of<R>(n, [&](int64_t i) { return (v[i] - mean) * (v[i] - mean); }) / R(n);
  const R rstd = R(1) / std::sqrt(variance + R(LAYER_NORM_EPS));
  RECATTN_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) normed[i] = (v[i] - mean) * rstd;
  return rstd;
}

// From grad = dL/dnormed to dL/dv, in place: rstd * (grad - mean(grad) - normed * mean(grad * normed)).
template <class R>
void normalise_backward(R* grad, const R* normed, R rstd, int64_t n) {
  const R mean = sum_of<R>(n, [&](int64_t i) { return grad[i]; }) / R(n);
  const R along = sum_of<R>(n, [&](int64_t i) { return grad[i] * normed[i]; }) / R(n);
  RECATTN_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) grad[i] = rstd * (grad[i] - mean - normed[i] * along);
}

// What one thread does at every step: some rows of the batch, some panels of the weights.
struct Share {
  int64_t b0, b1, panel0, panel1;
};

// The order in which a thread's products go over its panels, `at_once` of them at a time: back and forth. The last ones
// of a sweep are still in the second-level cache when the next begins; over and over in one order, all would be gone.
class Sweep {
 public:
  void start(int64_t begin, int64_t end, int64_t at_once = 1) {
    first = begin, step = at_once, count = left = ceil_div(end - begin, at_once), back = !back;
  }

  // The next ones, and in `after` those that follow them; -1 where there are none.
  int64_t next(int64_t& after) {
    const int64_t now = at(left);
    after = at(--left);
    return now;
  }
  int64_t next() {
    int64_t after;
    return next(after);
  }

 private:
  int64_t at(int64_t remaining) const {
    return remaining <= 0 ? -1 : first + (back ? remaining - 1 : count - remaining) * step;
  }

  int64_t first = 0, step = 1, count = 0, left = 0;
  bool back = true;
};

// Weights that fit the second-level cache are read there by every core: the rows are divided, and no thread ever waits
// for another. Else each thread keeps some panels, and all meet after every step. A CPU with tiles has 2 MB of that
// cache; but where a thread's rows are one strip, reading takes longer than multiplying, and half of it is worth waiting.
[[maybe_unused]] inline bool rows_apart(const Gated& p, int64_t weight_bytes, int threads, bool tiles) {
  const bool strips = tiles && p.B > TILE_ROWS * threads;
  return threads == 1 || (weight_bytes <= (strips ? int64_t(3) << 19 : int64_t(1) << 20) && p.B >= 8 * threads);
}

// Whether the products are of amx.h's tiles: where there are enough of them. Measured on an Intel Granite Rapids.
template <class R>
bool in_tiles(const Gated& p) {
  return has_tiles<R>() && p.B >= LEAST_TILE_ROWS && p.H >= 96 && p.B * p.H >= 3072;
}

// Where thread i's rows begin, in rows of about equally many steps.
[[maybe_unused]] inline int64_t rows_from(const Gated& p, int64_t i, int64_t threads) {
  if (!p.lengths || i == 0 || i == threads) return part(p.B, i, threads);
  int64_t total = 0, before = 0, b = 0;
  for (int64_t row = 0; row < p.B; ++row) total += steps_of(p, row);
  while (b < p.B && before < part(total, i, threads)) before += steps_of(p, b++);
  return b;
}

// Below this many multiplications a thread costs more than it brings.
[[maybe_unused]] inline int threads_for(const Gated& p) {
  const double products = double(p.T) * double(p.B) * double(p.H) * double(p.H) * gates_of(p.cell);
  return products < 262144 ? 1 : p.threads;
}

template <class F>
void by_cell(const Gated& p, F f) {
  const auto with = [&]<class R>() {
    switch (p.cell) {
      case Cell::rnn_tanh: return f.template operator()<Cell::rnn_tanh, R>();
      case Cell::rnn_relu: return f.template operator()<Cell::rnn_relu, R>();
      case Cell::lstm: return f.template operator()<Cell::lstm, R>();
      case Cell::gru: return f.template operator()<Cell::gru, R>();
      case Cell::gru_before: return f.template operator()<Cell::gru_before, R>();
    }
  };
  p.dtype == Dtype::float64 ? with.template operator()<double>() : with.template operator()<float>();
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
