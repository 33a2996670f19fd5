// What the kernels of the recurrences take: bindings_recurrent.cpp fills these structs from Python. Plain data: it is
// the same in every namespace.
#pragma once

#include "../cells.h"
#include "isa.h"

namespace recattn {

// A (T, B, H) tensor; the last dimension is contiguous. Strides are in elements.
struct Sequence {
  void* data = nullptr;  // null: absent, read as zeros
  int64_t stride_t = 0, stride_b = 0;
};

// A bool tensor (T, B), or (T, B, H) whose last dimension is contiguous.
struct Mask {
  const uint8_t* data = nullptr;  // null: absent
  int64_t stride_t = 0, stride_b = 0;
};

struct Indrnn {
  int64_t T, B, H;
  Dtype dtype;            // of the sequences; everything else is float32, or float64 beside float64
  Activation activation;
  double negative_slope;
  const void* weight_hh;  // (H,)
  const void* h0;         // (B, H) or null
  Mask reset;             // (T, B)
  const int64_t* lengths;  // (B,) or null
  bool reverse;
  int threads;
};

struct IndrnnForward : Indrnn {
  const void* bias;  // (H,) or null
  Sequence x, output;
  void* h_n;  // (B, H); holds the state while the kernel runs
};

struct IndrnnBackward : Indrnn {
  Sequence grad_output, output, grad_x;
  const void* grad_h_n;  // (B, H) or null
  void* grad_h0;         // (B, H); holds dL/dh[t-1] while the kernel runs
  void* grad_columns;    // (6, B, H) scratch: dL/dweight_hh and dL/dbias of each row, their parts, what rounding lost
  void* grad_weight_hh;  // (H,)
  void* grad_bias;       // (H,)
  double grad_clip;      // infinity: no clipping
};

// C = A B + bias: (M, N) from (M, K) and (K, N), in float32 or float64.
struct Gemm {
  int64_t M, N, K;
  Dtype dtype;
  const void* a;
  int64_t a_row, a_col;  // strides in elements
  const void* b;
  int64_t b_row, b_col;
  void* c;  // its rows are contiguous; never read before it is written
  int64_t c_row;
  const void* bias;  // (N,) or null
  int threads;
};

struct ColumnSum {
  int64_t M, N;
  Dtype dtype;    // float32 or float64
  const void* a;  // (M, N); its rows are contiguous
  int64_t a_row;
  void* out;  // (N,)
  int threads;
};

enum class Cell : int { rnn_tanh, rnn_relu, lstm, gru, gru_before };  // gru_before: the reset gate before the product

// G gates: 1 (rnn), 4 (lstm: i f g o), 3 (gru: r z n). R is float, or double beside float64 sequences.
// Packed: the rows of a step are those that take it, right after those of the step before, the first of them at
// starts[t]. Lengths do not grow with b then, and the masks are not packed.
struct Gated {
  int64_t T, B, H;
  Cell cell;
  Dtype dtype;                            // of the sequences; everything else is R
  const void* weight_hh;                  // (G * H, H)
  const void* bias_hh;                    // (G * H,) or null
  const void *ln_weight, *ln_bias;        // (G * H,), or both null: no layer norm of weight_hh h
  const void *ln_c_weight, *ln_c_bias;    // (H,), or both null: no layer norm of the lstm's cell
  const void *h0, *c0;                    // (B, H) or null
  Mask reset;                             // (T, B)
  const int64_t* lengths;                 // (B,) or null
  const int64_t* starts;                  // (T,): the sequences and what is kept are packed; null: they are not
  bool reverse;
  double zoneout_h, zoneout_c;            // the share of the state before that stays, where there is no mask
  Mask keep_h, keep_c;                    // (T, B, H): where the state before stays
  int threads;
};

// What is kept for the backward, each null where it is not: gates (T, B, 4 H) i f g o of the lstm and r z n q_n of the
// gru, (T, B, 3 H) r z n of gru_before, (T, B, H) n of the rnn; cells (T, B, H), the lstm's c; normed (T, B, G * H) and
// rstd (T, B), the layer norm of weight_hh h before its weight and bias.
struct GatedForward : Gated {
  Sequence x;         // (T, B, G * H), the projected input
  Sequence output;
  void *h_n, *c_n;    // (B, H); they hold the states while the kernel runs
  void *gates, *cells, *normed, *rstd;
};

struct GatedBackward : Gated {
  Sequence grad_output, output, grad_x;
  const void *grad_h_n, *grad_c_n;                     // (B, H) or null
  const void *gates, *cells, *normed, *rstd;           // gates may be null for an rnn whose n is output
  void* grad_q;  // (T, B, G * H) scratch for dL/d(weight_hh h); null: it is grad_x (rnn and lstm, no layer norm, S = R)
  double grad_clip;                                    // infinity: no clipping
  void *grad_h0, *grad_c0;                             // these and the rest: null where they are not wanted
  void *grad_weight_hh, *grad_bias_hh, *grad_ln_weight, *grad_ln_bias, *grad_ln_c_weight, *grad_ln_c_bias;
};

// One step from its gates. In a backward the gradients are set, and the outputs are not. Everything is contiguous but
// what has a stride between its rows, and R but what dtype is said of.
struct Step {
  int64_t B, H;
  Dtype dtype;  // of the lstm's gates, h and their gradients; of the gru's x_gates and their gradient
  int threads;
};

struct LstmStep : Step {
  const void* gates;  // (B, 4 H)
  int64_t gates_stride;
  const void* c;                       // (B, H)
  void *h, *c_n;                       // (B, H)
  const void *grad_h, *grad_c_n;       // (B, H) or null
  void *grad_gates, *grad_c;
};

struct GruStep : Step {
  const void* x_gates;  // (B, 3 H)
  int64_t x_stride;
  const void *h_gates, *h;  // (B, 3 H), (B, H)
  void* h_n;                // (B, H)
  const void* grad_h_n;     // (B, H)
  void *grad_x_gates, *grad_h_gates, *grad_h;
};

RECATTN_DECLARE(indrnn_forward, IndrnnForward)
RECATTN_DECLARE(indrnn_backward, IndrnnBackward)
RECATTN_DECLARE(gemm, Gemm)
RECATTN_DECLARE(column_sum, ColumnSum)
RECATTN_DECLARE(gated_forward, GatedForward)
RECATTN_DECLARE(gated_backward, GatedBackward)
RECATTN_DECLARE(lstm_step, LstmStep)
RECATTN_DECLARE(gru_step, GruStep)

}  // namespace recattn
