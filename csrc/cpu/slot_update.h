// What an iteration of SlotAttention does after its attention, in float32, for R slots of D features each:
//
//   h = GRU(updates, slots)
//   y = (h - mean(h)) / sqrt(var(h) + eps),  hidden = relu((y * norm_weight + norm_bias) up^T + up_bias)
//   result = h + hidden down^T + down_bias
#pragma once

#include "isa.h"

namespace recattn {

// Everything is contiguous.
struct SlotUpdate {
  int64_t R, D, M;
  int threads;
  float eps;
  const float *updates, *slots;                              // (R, D)
  const float *weight_ih, *weight_hh, *bias_ih, *bias_hh;    // (3 D, D), (3 D,), gates r z n
  const float *norm_weight, *norm_bias;                      // (D,)
  const float *up, *up_bias, *down, *down_bias;              // (M, D), (M,), (D, M), (D,)
  // Kept for the backward.
  float *x_gates, *h_gates, *normed, *rstd, *hidden;         // (R, 3 D) twice, (R, D), (R,), (R, M)
};

struct SlotUpdateForward : SlotUpdate {
  float* result;  // (R, D)
};

struct SlotUpdateBackward : SlotUpdate {
  const float* grad_result;
  // Null where they are not wanted.
  float *grad_updates, *grad_slots, *grad_weight_ih, *grad_weight_hh, *grad_bias_ih, *grad_bias_hh, *grad_norm_weight,
      *grad_norm_bias, *grad_up, *grad_up_bias, *grad_down, *grad_down_bias;
};

RECATTN_DECLARE(slot_update_forward, SlotUpdateForward)
RECATTN_DECLARE(slot_update_backward, SlotUpdateBackward)

}  // namespace recattn
