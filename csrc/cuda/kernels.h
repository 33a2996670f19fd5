// What the kernels of csrc/cuda take: bindings.cpp fills these structs from Python. Plain data, passed to the kernels as
// it is. Every function launches on `stream` and throws std::runtime_error where a launch fails.
#pragma once

#include <cuda_runtime_api.h>

#include "../cells.h"

namespace recattn {

enum class Dtype : int { float32, bfloat16, float16 };

// A (T, B, H) tensor; the last dimension is contiguous. Strides are in elements.
struct Sequence {
  void* data = nullptr;  // null: absent, read as zeros
  int64_t stride_t = 0, stride_b = 0;
};

// A contiguous tensor: a weight, a bias, a state, or the gradient of one.
struct Plain {
  void* data = nullptr;  // null: absent, read as zeros and not written
  Dtype dtype = Dtype::float32;
};

struct Indrnn {
  int64_t T, B, H;
  Dtype dtype;  // of the sequences
  Activation activation;
  float negative_slope;
  Plain weight_hh;       // (H,)
  Plain h0;              // (B, H)
  const uint8_t* reset;  // (T, B) or null
  int64_t reset_stride_t, reset_stride_b;
  const int64_t* lengths;  // (B,) or null; clamped to [0, T]
  bool reverse;
  bool scan;  // over time in parallel; forward: relu, relu6, hardtanh and identity alone
};

struct IndrnnForward : Indrnn {
  Plain bias;  // (H,)
  Sequence x, output;
  Plain h_n;  // (B, H)
};

struct IndrnnBackward : Indrnn {
  Sequence grad_output, output, grad_x;
  Plain grad_h_n;       // (B, H)
  Plain grad_h0;        // (B, H)
  float* grad_columns;  // (2, B, H) scratch: dL/dweight_hh and dL/dbias of each row
  Plain grad_weight_hh, grad_bias;  // (H,)
  float grad_clip;                  // infinity: no clipping
};

// The order is that of CELLS in recattn_kernels/ops/gated/contract.py.
enum class Cell : int { rnn_tanh, rnn_relu, lstm, gru, gru_before };

// How a persistent kernel is laid out, by recattn_kernels/ops/gated/launch_plan.py: block (slice, group) has the units
// from slice * units on and, of each pass over slices * groups blocks, the rows from group * rows on.
struct GatedPlan {
  int units, rows, slices, groups;  // rows: a multiple of 8
  int64_t shared, workspace;        // bytes of a block's shared memory, and of all blocks' in global memory
  bool cluster;                     // whether the slices of a group are a thread-block cluster
};

struct Mask {
  const uint8_t* data = nullptr;  // null: absent
  int64_t stride_t = 0, stride_b = 0;
};

struct Gated {
  int64_t T, B, H;
  Cell cell;
  Dtype dtype;             // of the sequences
  bool tf32;               // whether float32 may be multiplied as TF32
  Plain weight_hh;         // (G*H, H); its type is that of the product
  // (G*H,), and (H,) of the lstm's c; absent: no layer norm
  Plain ln_weight, ln_bias, ln_c_weight, ln_c_bias;
  Mask reset;              // (T, B)
  const int64_t* lengths;  // (B,) or null; clamped to [0, T]
  bool reverse;
  float zoneout_h, zoneout_c;  // the rates, 0 for none
  Mask keep_h, keep_c;         // (T, B, H)
  GatedPlan plan;
  void* workspace;    // what is exchanged between blocks, and last, without clusters, a counter of each group
  int64_t first_row;  // of the pass
};

struct GatedForward : Gated {
  Plain bias_hh;  // (G*H,)
  Plain h0, c0;   // (B, H)
  Sequence x, output;
  Plain h_n, c_n;  // (B, H)
  // Kept for the backward, or null. normed: W_hh h, normalised; rstd: by what it was multiplied.
  float *gates, *cells, *normed, *rstd;  // (T, B, KEPT*H), (T, B, H), (T, B, G*H), (T, B)
};

struct GatedBackward : Gated {
  Plain h0, c0;  // (B, H)
  Sequence grad_output, output;
  Sequence gates;                // as kept, float32
  float *cells, *normed, *rstd;  // as kept
  Sequence grad_x;
  Sequence grad_q;  // dL/d(W_hh h) in weight_hh's type; null where it is grad_x
  // Of each plan.rows rows of the batch dL/dln_weight, dL/dln_bias and, in the lstm, dL/dln_c_weight, dL/dln_c_bias.
  float* sums;
  Plain grad_h_n, grad_c_n;  // (B, H)
  Plain grad_h0, grad_c0;    // (B, H)
  float grad_clip;           // infinity: no clipping
};

void gated_forward(const GatedForward& p, cudaStream_t stream);
void gated_backward(const GatedBackward& p, cudaStream_t stream);
// Whether what the current device runs was compiled with clusters: from an older architecture's PTX it was not.
bool gated_clusters();

void indrnn_forward(const IndrnnForward& p, cudaStream_t stream);
void indrnn_backward(const IndrnnBackward& p, cudaStream_t stream);
// Of the two functions above, where p.scan; the sums over the batch are left out.
void indrnn_forward_scan(const IndrnnForward& p, cudaStream_t stream);
void indrnn_backward_scan(const IndrnnBackward& p, cudaStream_t stream);

}  // namespace recattn
