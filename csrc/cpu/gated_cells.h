// The cells of the gated recurrences' forward: units of one row of one step, from x and q = weight_hh h without its bias.
#pragma once

#include "gated.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

template <Cell C, class R>
RECATTN_FN void rnn_row(const R* x, const R* q, const R* bias, R* h, int64_t n) {
  for (Lanes<R> at = {0, n}; at.i < n; at.i += LANES<R>) {
    const Vec<R> v = at.load(x) + (at.load(q) + at.load(bias));
    if constexpr (C == Cell::rnn_relu) {
      at.store(h, v < R(0) ? Vec<R>{} : v);
    } else {
      at.store(h, tanh_(v));
    }
  }
}

// The gates, and c' before any zoneout. Strides: from one gate to the next.
template <class R>
RECATTN_FN void lstm_row(const R* const* x, const R* q, int64_t q_stride, const R* bias, int64_t bias_stride,
                         const R* c, R* const* gates, R* c_new, int64_t n) {
  for (Lanes<R> at = {0, n}; at.i < n; at.i += LANES<R>) {
    const auto sum = [&](int g) __attribute__((always_inline)) {
      return at.load(x[g]) + (at.load(q + g * q_stride) + at.load(bias + g * bias_stride));
    };
    const LstmGates<Vec<R>> a = lstm_gates(sum(0), sum(1), sum(2), sum(3));
    at.store(gates[0], a.i);
    at.store(gates[1], a.f);
    at.store(gates[2], a.g);
    at.store(gates[3], a.o);
    at.store(c_new, lstm_cell(a, at.load(c)));
  }
}

template <class R>
RECATTN_FN void gru_row(const R* const* x, const R* q, int64_t q_stride, const R* bias, int64_t bias_stride,
                        const R* h, R* const* gates, R* h_new, int64_t n) {
  for (Lanes<R> at = {0, n}; at.i < n; at.i += LANES<R>) {
    const auto product = [&](int g) __attribute__((always_inline)) {
      return at.load(q + g * q_stride) + at.load(bias + g * bias_stride);
    };
    const Vec<R> r = sigmoid(at.load(x[0]) + product(0)), z = sigmoid(at.load(x[1]) + product(1));
    const Vec<R> q_n = product(2), candidate = tanh_(at.load(x[2]) + r * q_n);
    at.store(gates[0], r);
    at.store(gates[1], z);
    at.store(gates[2], candidate);
    at.store(gates[3], q_n);
    at.store(h_new, gru_state(z, candidate, at.load(h)));
  }
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
