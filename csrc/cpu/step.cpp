// One step of an LSTM or a GRU from its gates, which somebody else has multiplied: elementwise, one pass over memory.
//
//   lstm: c[t] = sigmoid(f) * c + sigmoid(i) * tanh(g);  h = sigmoid(o) * tanh(c[t])
//   gru:  r = sigmoid(x_r + q_r);  z = sigmoid(x_z + q_z);  n = tanh(x_n + r * q_n);  h' = (1 - z) * n + z * h
#include "ahead.h"
#include "kernels.h"
#include "streaming.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr int64_t CHUNK = 256;  // units worked on at a time: their gates stay in the first-level cache

template <class R> struct Part {
  alignas(64) R data[CHUNK];
  operator R*() { return data; }
};

// G gates of a part of a row.
template <int G, class R> struct Gates {
  Part<R> of[G];
  Part<R>& operator[](int g) { return of[g]; }
};

// Reads n elements, and asks for those of the next row.
template <class S, class R>
RECATTN_FN void read(R* __restrict to, const S* __restrict from, int64_t next, int64_t n) {
  fetch(from + next, n * sizeof(S));
  if constexpr (sizeof(S) == 2) {
    widen(to, from, n);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}

// Calls work(row, first unit, units) for all of (B, H), over threads.
template <class F>
void each_chunk(const Step& p, F work) {
  const int64_t across = ceil_div(p.H, CHUNK);
#pragma omp parallel num_threads(p.B * p.H < 8192 ? 1 : p.threads)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < p.B * across; ++i) {
      const int64_t first = i % across * CHUNK;
      work(i / across, first, least(CHUNK, p.H - first));
    }
    end_streaming();
  }
}

// Whether a result of G values of S a unit goes past the caches.
template <int G, class S>
bool streams(const Step& p, const void* to) {
  return streams(to, p.B * G, p.H * sizeof(S));
}

// G gates of a row, of H units each, read from or written to where `unit` is the first.
template <int G, class S, class R>
RECATTN_FN void read_gates(Gates<G, R>& to, const void* from, int64_t stride, int64_t H, int64_t b, int64_t unit,
                           int64_t n) {
  for (int g = 0; g < G; ++g) read<S>(to[g].data, static_cast<const S*>(from) + b * stride + g * H + unit, stride, n);
}
template <int G, class S, class R>
RECATTN_FN void write_gates(void* to, Gates<G, R>& from, int64_t H, int64_t b, int64_t unit, int64_t n, bool stream) {
  for (int g = 0; g < G; ++g) {
    write<CHUNK, S, R>(static_cast<S*>(to) + (b * G + g) * H + unit, from[g], n, stream);
  }
}

// A (B, H) tensor's part, read into a buffer; zeros for an absent one.
template <class S, class R>
RECATTN_FN void read_state(Part<R>& to, const void* from, int64_t H, int64_t b, int64_t unit, int64_t n) {
  if (from) {
    read<S>(to.data, static_cast<const S*>(from) + b * H + unit, H, n);
  } else {
    memset(to, 0, n * sizeof(R));
  }
}
template <class S, class R>
RECATTN_FN void write_state(void* to, Part<R>& from, int64_t H, int64_t b, int64_t unit, int64_t n, bool stream) {
  write<CHUNK, S, R>(static_cast<S*>(to) + b * H + unit, from, n, stream);
}

template <class R>
RECATTN_FN LstmGates<Vec<R>> activated(const Lanes<R>& at, Gates<4, R>& gates) {
  return lstm_gates(at.load(gates[0]), at.load(gates[1]), at.load(gates[2]), at.load(gates[3]));
}

template <class S, class R>
void lstm_forward(const LstmStep& p) {
  const bool stream = streams<1, S>(p, p.h), stream_c = streams<1, R>(p, p.c_n);
  each_chunk(p, [&](int64_t b, int64_t unit, int64_t n) {
    Gates<4, R> gates;
    Part<R> c, h;
    read_gates<4, S>(gates, p.gates, p.gates_stride, p.H, b, unit, n);
    read_state<R>(c, p.c, p.H, b, unit, n);
    for (Lanes<R> at = {0, n}; at.i < n; at.i += LANES<R>) {
      const auto a = activated(at, gates);
      const Vec<R> c_n = lstm_cell(a, at.load(c));
      at.store(c, c_n);
      at.store(h, a.o * tanh_(c_n));
    }
    write_state<S>(p.h, h, p.H, b, unit, n, stream);
    write_state<R>(p.c_n, c, p.H, b, unit, n, stream_c);
  });
}

template <class S, class R>
void lstm_backward_(const LstmStep& p) {
  const bool stream = streams<4, S>(p, p.grad_gates), stream_c = streams<1, R>(p, p.grad_c);
  each_chunk(p, [&](int64_t b, int64_t unit, int64_t n) {
    Gates<4, R> gates;
    Part<R> c, dh, dc;
    read_gates<4, S>(gates, p.gates, p.gates_stride, p.H, b, unit, n);
    read_state<R>(c, p.c, p.H, b, unit, n);
    read_state<S>(dh, p.grad_h, p.H, b, unit, n);
    read_state<R>(dc, p.grad_c_n, p.H, b, unit, n);
    for (Lanes<R> at = {0, n}; at.i < n; at.i += LANES<R>) {
      const auto a = activated(at, gates);
      const Vec<R> before = at.load(c), grad = at.load(dh), squashed = tanh_(lstm_cell(a, before));
      const Vec<R> flow = at.load(dc) + grad * a.o * tanh_slope(squashed);
      const auto d = lstm_backward(a, before, squashed, flow, grad);
      at.store(gates[0], d.i);
      at.store(gates[1], d.f);
      at.store(gates[2], d.g);
      at.store(gates[3], d.o);
      at.store(c, a.f * flow);
    }
    write_gates<4, S>(p.grad_gates, gates, p.H, b, unit, n, stream);
    write_state<R>(p.grad_c, c, p.H, b, unit, n, stream_c);
  });
}

template <class S, class R>
void gru_forward(const GruStep& p) {
  const bool stream = streams<1, R>(p, p.h_n);
  each_chunk(p, [&](int64_t b, int64_t unit, int64_t n) {
    Gates<3, R> x, q;
    Part<R> h;
    read_gates<3, S>(x, p.x_gates, p.x_stride, p.H, b, unit, n);
    read_gates<3, R>(q, p.h_gates, 3 * p.H, p.H, b, unit, n);
    read_state<R>(h, p.h, p.H, b, unit, n);
    for (Lanes<R> at = {0, n}; at.i < n; at.i += LANES<R>) {
      const Vec<R> r = sigmoid(at.load(x[0]) + at.load(q[0])), z = sigmoid(at.load(x[1]) + at.load(q[1]));
      at.store(h, gru_state(z, tanh_(at.load(x[2]) + r * at.load(q[2])), at.load(h)));
    }
    write_state<R>(p.h_n, h, p.H, b, unit, n, stream);
  });
}

template <class S, class R>
void gru_backward(const GruStep& p) {
  const bool stream_x = streams<3, S>(p, p.grad_x_gates), stream_q = streams<3, R>(p, p.grad_h_gates);
  const bool stream = streams<1, R>(p, p.grad_h);
  each_chunk(p, [&](int64_t b, int64_t unit, int64_t n) {
    Gates<3, R> x, q;
    Part<R> h, dh;
    read_gates<3, S>(x, p.x_gates, p.x_stride, p.H, b, unit, n);
    read_gates<3, R>(q, p.h_gates, 3 * p.H, p.H, b, unit, n);
    read_state<R>(h, p.h, p.H, b, unit, n);
    read_state<R>(dh, p.grad_h_n, p.H, b, unit, n);
    for (Lanes<R> at = {0, n}; at.i < n; at.i += LANES<R>) {
      const Vec<R> r = sigmoid(at.load(x[0]) + at.load(q[0])), z = sigmoid(at.load(x[1]) + at.load(q[1]));
      const Vec<R> q_n = at.load(q[2]), grad = at.load(dh), candidate = tanh_(at.load(x[2]) + r * q_n);
      const Vec<R> dz = gru_backward_z(z, candidate, at.load(h), grad), dn = gru_backward_n(z, candidate, grad);
      const Vec<R> dr = dn * q_n * sigmoid_slope(r);
      at.store(x[0], dr);
      at.store(q[0], dr);
      at.store(x[1], dz);
      at.store(q[1], dz);
      at.store(x[2], dn);
      at.store(q[2], dn * r);
      at.store(h, z * grad);
    }
    write_gates<3, S>(p.grad_x_gates, x, p.H, b, unit, n, stream_x);
    write_gates<3, R>(p.grad_h_gates, q, p.H, b, unit, n, stream_q);
    write_state<R>(p.grad_h, h, p.H, b, unit, n, stream);
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
