// The kernels of slot_update.h: the products, the GRU's step and the layer normalisation of the other sources in turn,
// without a tensor or a call from Python between them, which for some hundred slots take longer than the arithmetic.
//
// The normalisation's scale and shift go into the MLP's first layer: (y * norm_weight + norm_bias) up^T is
// y (up * norm_weight)^T + up norm_bias.
#include "slot_update.h"

#include "gemm_tile.h"
#include "kernels.h"
#include "normalise.h"
#include "workspace.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

// Of a contiguous matrix.
Matrix<float> rows(const float* data, int64_t width) { return {data, width, 1}; }
Matrix<float> columns(const float* data, int64_t width) { return rows(data, width).transposed(); }

struct Update {
  explicit Update(const SlotUpdate& p) : p(p) {}

  // c (m, n) = a (m, k) b (k, n) + bias
  void multiply(int64_t m, int64_t n, int64_t k, Matrix<float> a, Matrix<float> b, float* c,
                const float* bias = nullptr) const {
    gemm({m, n, k, Dtype::float32, a.data, a.row, a.col, b.data, b.row, b.col, c, n, bias, p.threads});
  }

  // The sum of a (R, n) over its rows.
  void sum_rows(const float* a, int64_t n, float* out) const {
    column_sum({p.R, n, Dtype::float32, a, n, out, p.threads});
  }

  // f(i) for every i < n.
  template <class F>
  void each(int64_t n, F f) const {
#pragma omp parallel for schedule(static) num_threads(n < 32768 ? 1 : p.threads)
    for (int64_t i = 0; i < n; ++i) f(i);
  }

  GruStep gru() const {
    GruStep step{};
    step.B = p.R, step.H = p.D;
    step.dtype = Dtype::float32;
    step.threads = p.threads;
    step.x_gates = p.x_gates, step.x_stride = 3 * p.D;
    step.h_gates = p.h_gates, step.h = p.slots;
    return step;
  }

  Normalise norm() const {
    Normalise norm{};
    norm.rows = p.R, norm.width = p.D;
    norm.threads = p.threads;
    norm.eps = p.eps;
    norm.y = p.normed, norm.rstd = p.rstd;
    return norm;
  }

  // up * norm_weight
  void scale_up(float* scaled) const {
    for (int64_t m = 0; m < p.M; ++m) {
      for (int64_t d = 0; d < p.D; ++d) scaled[m * p.D + d] = p.up[m * p.D + d] * p.norm_weight[d];
    }
  }

  const SlotUpdate& p;
};

int64_t size(int64_t n) { return Workspace::bytes<float>(n); }

}  // namespace

void slot_update_forward(const SlotUpdateForward& p) {
  const Update update(p);
  const int64_t R = p.R, D = p.D, M = p.M;
  Workspace memory(size(M * D) + size(M) + size(R * D));
  float *const scaled = memory.take<float>(M * D), *const shifted = memory.take<float>(M);
  float *const mlp = memory.take<float>(R * D), *const h = p.result;

  update.multiply(R, 3 * D, D, rows(p.updates, D), columns(p.weight_ih, D), p.x_gates, p.bias_ih);
  update.multiply(R, 3 * D, D, rows(p.slots, D), columns(p.weight_hh, D), p.h_gates, p.bias_hh);
  GruStep step = update.gru();
  step.h_n = h;
  gru_step(step);

  Normalise norm = update.norm();
  norm.x = h;
  normalise(norm);
  update.scale_up(scaled);
  update.multiply(1, M, D, rows(p.norm_bias, D), columns(p.up, D), shifted, p.up_bias);
  update.multiply(R, M, D, rows(p.normed, D), columns(scaled, D), p.hidden, shifted);
  float* const hidden = p.hidden;
  update.each(R * M, [=](int64_t i) { hidden[i] = hidden[i] < 0 ? 0 : hidden[i]; });  // keeps NaN
  update.multiply(R, D, M, rows(hidden, M), columns(p.down, M), mlp, p.down_bias);
  update.each(R * D, [=](int64_t i) { h[i] += mlp[i]; });
}

void slot_update_backward(const SlotUpdateBackward& p) {
  const Update update(p);
  const int64_t R = p.R, D = p.D, M = p.M;
  Workspace memory(2 * size(M * D) + size(M) + size(R * M) + 3 * size(R * D) + 2 * size(R * 3 * D));
  float *const scaled = memory.take<float>(M * D), *const grad_scaled = memory.take<float>(M * D);
  float *const grad_shifted = memory.take<float>(M), *const grad_hidden = memory.take<float>(R * M);
  float *const grad_normed = memory.take<float>(R * D), *const grad_h = memory.take<float>(R * D);
  float *const along = memory.take<float>(R * D);
  float *const grad_x_gates = memory.take<float>(R * 3 * D), *const grad_h_gates = memory.take<float>(R * 3 * D);

  // The MLP.
  if (p.grad_down) update.multiply(D, M, R, columns(p.grad_result, D), rows(p.hidden, M), p.grad_down);
  if (p.grad_down_bias) update.sum_rows(p.grad_result, D, p.grad_down_bias);
  update.multiply(R, M, D, rows(p.grad_result, D), rows(p.down, M), grad_hidden);
  const float* const hidden = p.hidden;
  update.each(R * M, [=](int64_t i) { grad_hidden[i] = hidden[i] <= 0 ? 0 : grad_hidden[i]; });
  if (p.grad_up || p.grad_norm_weight) {
    update.multiply(M, D, R, columns(grad_hidden, M), rows(p.normed, D), grad_scaled);
  }
  if (p.grad_up || p.grad_up_bias || p.grad_norm_bias) update.sum_rows(grad_hidden, M, grad_shifted);
  if (p.grad_up_bias) memcpy(p.grad_up_bias, grad_shifted, M * sizeof(float));
  if (p.grad_up) {
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t d = 0; d < D; ++d) {
        p.grad_up[m * D + d] = grad_scaled[m * D + d] * p.norm_weight[d] + grad_shifted[m] * p.norm_bias[d];
      }
    }
  }
  if (p.grad_norm_bias) update.multiply(1, D, M, rows(grad_shifted, M), rows(p.up, D), p.grad_norm_bias);
  if (p.grad_norm_weight) {
    memset(p.grad_norm_weight, 0, D * sizeof(float));
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t d = 0; d < D; ++d) p.grad_norm_weight[d] += grad_scaled[m * D + d] * p.up[m * D + d];
    }
  }

  // The normalisation, and the sum around both.
  update.scale_up(scaled);
  update.multiply(R, D, M, rows(grad_hidden, M), rows(scaled, D), grad_normed);
  Normalise norm = update.norm();
  norm.dy = grad_normed, norm.dx = grad_h;
  normalise(norm);
  const float* const grad_result = p.grad_result;
  update.each(R * D, [=](int64_t i) { grad_h[i] += grad_result[i]; });

  // The GRU.
  GruStep step = update.gru();
  step.grad_h_n = grad_h;
  step.grad_x_gates = grad_x_gates, step.grad_h_gates = grad_h_gates;
  step.grad_h = p.grad_slots ? p.grad_slots : along;
  gru_step(step);
  const auto weights = [&](const float* grad, const float* input, float* grad_weight, float* grad_bias) {
    if (grad_weight) update.multiply(3 * D, D, R, columns(grad, 3 * D), rows(input, D), grad_weight);
    if (grad_bias) update.sum_rows(grad, 3 * D, grad_bias);
  };
  weights(grad_x_gates, p.updates, p.grad_weight_ih, p.grad_bias_ih);
  weights(grad_h_gates, p.slots, p.grad_weight_hh, p.grad_bias_hh);
  if (p.grad_updates) update.multiply(R, D, 3 * D, rows(grad_x_gates, 3 * D), rows(p.weight_ih, D), p.grad_updates);
  if (p.grad_slots) {
    update.multiply(R, D, 3 * D, rows(grad_h_gates, 3 * D), rows(p.weight_hh, D), along);
    float* const grad_slots = p.grad_slots;
    update.each(R * D, [=](int64_t i) { grad_slots[i] += along[i]; });
  }
}

}  // namespace RECATTN_ISA
}  // namespace recattn
