// What the backward of the gated cells computes of a row at one step, unit by unit, and the gradients of the layer
// norms' weights and biases, which are sums over rows.
#pragma once

#include "gated.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

// dn = dh * act'(n)
template <Cell C, class R>
RECATTN_FN void rnn_row(const R* __restrict n, const R* __restrict dh, R* __restrict dq, int64_t size) {
  constexpr Activation A = C == Cell::rnn_relu ? Activation::relu : Activation::tanh;
  for (int64_t i = 0; i < size; ++i) dq[i] = times_derivative<A>(dh[i], derivative<A>(n[i], R(0)));
}

// h = o * tanh(c'), c' = f * c + i * g: squashed = tanh(c'), and dc gets its share.
template <class R>
RECATTN_FN void squash_row(const R* gates, const R* c, const R* dh, R* dc, R* squashed, int64_t H, int64_t n) {
  const R *input = gates, *forget = gates + H, *g = gates + 2 * H, *o = gates + 3 * H;
  RECATTN_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    squashed[i] = tanh_(forget[i] * c[i] + input[i] * g[i]);
    dc[i] += dh[i] * o[i] * tanh_slope(squashed[i]);
  }
}

// From dh, dc = dL/dc' and squashed = tanh(c'). stays: what zoneout gives c[t-1]; flow_c: all that goes there.
template <class R>
RECATTN_FN void lstm_row(const R* gates, const R* c, const R* squashed, const R* dh, const R* dc, const R* stays,
                         R* flow_c, R* dq, int64_t H, int64_t n) {
  RECATTN_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const LstmGates<R> a = {gates[i], gates[H + i], gates[2 * H + i], gates[3 * H + i]};
    const LstmGates<R> d = lstm_backward(a, c[i], squashed[i], dc[i], dh[i]);
    dq[i] = d.i;
    dq[H + i] = d.f;
    dq[2 * H + i] = d.g;
    dq[3 * H + i] = d.o;
    flow_c[i] = stays[i] + dc[i] * a.f;
  }
}

// dx: of x, whose third part is dn; dq: of q, whose third part is r * dn. stays: what zoneout gives h[t-1], and then
// also what comes to it through z.
template <class R>
RECATTN_FN void gru_row(const R* gates, const R* h, const R* dh, R* stays, R* dx_n, R* dq, int64_t H, int64_t n) {
  RECATTN_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const R r = gates[i], z = gates[H + i], candidate = gates[2 * H + i], q_n = gates[3 * H + i];
    const R dn = gru_backward_n(z, candidate, dh[i]);
    dq[i] = dn * q_n * sigmoid_slope(r);
    dq[H + i] = gru_backward_z(z, candidate, h[i], dh[i]);
    dq[2 * H + i] = dn * r;
    dx_n[i] = dn;
    stays[i] += z * dh[i];
  }
}

// gru_before: dz and dn, before anything is known of dr.
template <class R>
RECATTN_FN void gru_before_row(const R* gates, const R* h, const R* dh, R* stays, R* dq, int64_t H, int64_t n) {
  RECATTN_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    const R z = gates[H + i], candidate = gates[2 * H + i];
    dq[H + i] = gru_backward_z(z, candidate, h[i], dh[i]);
    dq[2 * H + i] = gru_backward_n(z, candidate, dh[i]);
    stays[i] += z * dh[i];
  }
}

// gru_before: dr, from reset_h = weight_hn^T dn, the gradient of r * h. flow: what goes to h[t-1].
template <class R>
RECATTN_FN void gru_reset_row(const R* r, const R* h, const R* reset_h, R* flow, R* dq, int64_t n) {
  RECATTN_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    dq[i] = reset_h[i] * h[i] * sigmoid_slope(r[i]);
    flow[i] += reset_h[i] * r[i];
  }
}

// dL/dweight and dL/dbias of normed * weight + bias. normed may be null: there is no weight then.
template <class R>
void add_sums(const R* __restrict grad, const R* __restrict normed, double* __restrict weight, double* __restrict bias,
              int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (normed) weight[i] += double(grad[i] * normed[i]);
    bias[i] += double(grad[i]);
  }
}

// squash_row() where h = o * tanh(LN(c')). normed and grad are scratch.
template <class R>
RECATTN_FN void squash_normed_row(const R* gates, const R* c, const R* weight, const R* ln_bias, const R* dh, R* dc,
                                  R* squashed, R* normed, R* grad, double* grad_weight, double* grad_bias, int64_t H,
                                  int64_t n) {
  const R *input = gates, *forget = gates + H, *g = gates + 2 * H, *o = gates + 3 * H;
  RECATTN_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) normed[i] = forget[i] * c[i] + input[i] * g[i];
  const R rstd = normalise(normed, normed, n);
  RECATTN_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    squashed[i] = tanh_(normed[i] * weight[i] + ln_bias[i]);
    grad[i] = dh[i] * o[i] * tanh_slope(squashed[i]);
  }
  add_sums(grad, normed, grad_weight, grad_bias, n);
  for (int64_t i = 0; i < n; ++i) grad[i] *= weight[i];
  normalise_backward(grad, normed, rstd, n);
  for (int64_t i = 0; i < n; ++i) dc[i] += grad[i];
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
