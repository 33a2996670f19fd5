// One step of an LSTM or a GRU from its gates, which somebody else has multiplied: elementwise, one pass over memory.
//
//   lstm: c[t] = sigmoid(f) * c + sigmoid(i) * tanh(g);  h = sigmoid(o) * tanh(c[t])
//   gru:  r = sigmoid(x_r + q_r);  z = sigmoid(x_z + q_z);  n = tanh(x_n + r * q_n);  h' = (1 - z) * n + z * h
#include "kernels.h"
#include "numeric.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr int64_t CHUNK = 64;  // units worked on at a time: their gates stay in the first-level cache

template <class S, class R>
RECATTN_FN void read(R* __restrict to, const S* __restrict from, int64_t n) {
  if constexpr (sizeof(S) == 2) {
    widen(to, from, n);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}

template <class S, class R>
RECATTN_FN void write(S* __restrict to, const R* __restrict from, int64_t n) {
  if constexpr (sizeof(S) == 2) {
    narrow(to, from, n);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}

// Calls work(row, first unit, units) for all of (B, H), over threads.
template <class F>
void each_chunk(const Step& p, F work) {
  const int64_t across = (p.H + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(p.B * p.H < 8192 ? 1 : p.threads)
  for (int64_t i = 0; i < p.B * across; ++i) {
    const int64_t first = i % across * CHUNK;
    work(i / across, first, p.H - first < CHUNK ? p.H - first : CHUNK);
  }
}

// G gates of a row, of H units each, read from or written to where `unit` is the first.
template <int G, class S, class R>
RECATTN_FN void read_gates(R (&to)[G][CHUNK], const void* from, int64_t stride, int64_t H, int64_t b, int64_t unit,
                           int64_t n) {
  for (int g = 0; g < G; ++g) read(to[g], static_cast<const S*>(from) + b * stride + g * H + unit, n);
}
template <int G, class S, class R>
RECATTN_FN void write_gates(void* to, const R (&from)[G][CHUNK], int64_t H, int64_t b, int64_t unit, int64_t n) {
  for (int g = 0; g < G; ++g) write(static_cast<S*>(to) + (b * G + g) * H + unit, from[g], n);
}

// A (B, H) tensor's part, read into a buffer; zeros for an absent one.
template <class S, class R>
RECATTN_FN void read_state(R* to, const void* from, int64_t offset, int64_t n) {
  if (from) {
    read(to, static_cast<const S*>(from) + offset, n);
  } else {
    memset(to, 0, n * sizeof(R));
  }
}

template <class S, class R>
void lstm_forward(const LstmStep& p) {
  each_chunk(p, [&](int64_t b, int64_t unit, int64_t n) {
    const int64_t at = b * p.H + unit;
    R gates[4][CHUNK], c[CHUNK], h[CHUNK];
    read_gates<4, S>(gates, p.gates, p.gates_stride, p.H, b, unit, n);
    read_state<R>(c, p.c, at, n);
    for (int64_t j = 0; j < n; ++j) {
      const auto a = lstm_gates(gates[0][j], gates[1][j], gates[2][j], gates[3][j]);
      c[j] = lstm_cell(a, c[j]);
      h[j] = a.o * tanh_(c[j]);
    }
    write(static_cast<S*>(p.h) + at, h, n);
    write(static_cast<R*>(p.c_n) + at, c, n);
  });
}

template <class S, class R>
void lstm_backward_(const LstmStep& p) {
  each_chunk(p, [&](int64_t b, int64_t unit, int64_t n) {
    const int64_t at = b * p.H + unit;
    R gates[4][CHUNK], c[CHUNK], dh[CHUNK], dc[CHUNK];
    read_gates<4, S>(gates, p.gates, p.gates_stride, p.H, b, unit, n);
    read_state<R>(c, p.c, at, n);
    read_state<S>(dh, p.grad_h, at, n);
    read_state<R>(dc, p.grad_c_n, at, n);
    for (int64_t j = 0; j < n; ++j) {
      const auto a = lstm_gates(gates[0][j], gates[1][j], gates[2][j], gates[3][j]);
      const R squashed = tanh_(lstm_cell(a, c[j]));
      const R flow = dc[j] + dh[j] * a.o * tanh_slope(squashed);
      const auto d = lstm_backward(a, c[j], squashed, flow, dh[j]);
      gates[0][j] = d.i;
      gates[1][j] = d.f;
      gates[2][j] = d.g;
      gates[3][j] = d.o;
      c[j] = a.f * flow;
    }
    write_gates<4, S>(p.grad_gates, gates, p.H, b, unit, n);
    write(static_cast<R*>(p.grad_c) + at, c, n);
  });
}

template <class S, class R>
void gru_forward(const GruStep& p) {
  each_chunk(p, [&](int64_t b, int64_t unit, int64_t n) {
    const int64_t at = b * p.H + unit;
    R x[3][CHUNK], q[3][CHUNK], h[CHUNK];
    read_gates<3, S>(x, p.x_gates, p.x_stride, p.H, b, unit, n);
    read_gates<3, R>(q, p.h_gates, 3 * p.H, p.H, b, unit, n);
    read_state<R>(h, p.h, at, n);
    for (int64_t j = 0; j < n; ++j) {
      const R r = sigmoid(x[0][j] + q[0][j]), z = sigmoid(x[1][j] + q[1][j]);
      h[j] = gru_state(z, tanh_(x[2][j] + r * q[2][j]), h[j]);
    }
    write(static_cast<R*>(p.h_n) + at, h, n);
  });
}

template <class S, class R>
void gru_backward(const GruStep& p) {
  each_chunk(p, [&](int64_t b, int64_t unit, int64_t n) {
    const int64_t at = b * p.H + unit;
    R x[3][CHUNK], q[3][CHUNK], h[CHUNK], dh[CHUNK];
    read_gates<3, S>(x, p.x_gates, p.x_stride, p.H, b, unit, n);
    read_gates<3, R>(q, p.h_gates, 3 * p.H, p.H, b, unit, n);
    read_state<R>(h, p.h, at, n);
    read_state<R>(dh, p.grad_h_n, at, n);
    for (int64_t j = 0; j < n; ++j) {
      const R r = sigmoid(x[0][j] + q[0][j]), z = sigmoid(x[1][j] + q[1][j]);
      const R candidate = tanh_(x[2][j] + r * q[2][j]);
      const R dz = gru_backward_z(z, candidate, h[j], dh[j]), dn = gru_backward_n(z, candidate, dh[j]);
      const R dr = dn * q[2][j] * sigmoid_slope(r);
      x[0][j] = q[0][j] = dr;
      x[1][j] = q[1][j] = dz;
      x[2][j] = dn;
      q[2][j] = dn * r;
      h[j] = z * dh[j];
    }
    write_gates<3, S>(p.grad_x_gates, x, p.H, b, unit, n);
    write_gates<3, R>(p.grad_h_gates, q, p.H, b, unit, n);
    write(static_cast<R*>(p.grad_h) + at, h, n);
  });
}

template <class F>
void by_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f.template operator()<float, float>();
    case Dtype::float64: return f.template operator()<double, double>();
    case Dtype::bfloat16: return f.template operator()<BFloat16, float>();
    case Dtype::float16: return f.template operator()<Float16, float>();
  }
}

}  // namespace

void lstm_step(const LstmStep& p) {
  by_dtype(p.dtype, [&]<class S, class R>() { p.grad_gates ? lstm_backward_<S, R>(p) : lstm_forward<S, R>(p); });
}

void gru_step(const GruStep& p) {
  by_dtype(p.dtype, [&]<class S, class R>() { p.grad_x_gates ? gru_backward<S, R>(p) : gru_forward<S, R>(p); });
}

}  // namespace RECATTN_ISA
}  // namespace recattn
