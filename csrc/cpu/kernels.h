// What the kernels of csrc/cpu take and who calls them: bindings.cpp fills these structs from Python and calls the
// function of the widest instruction set that the machine has. Plain data: it is the same in every namespace.
#pragma once

#include "../cells.h"

namespace recattn {

enum class Dtype : int { float32, float64, bfloat16, float16 };

// A (T, B, H) tensor; the last dimension is contiguous. Strides are in elements.
struct Sequence {
  void* data = nullptr;  // null: absent, read as zeros
  int64_t stride_t = 0, stride_b = 0;
};

struct Indrnn {
  int64_t T, B, H;
  Dtype dtype;            // of the sequences; everything else is float32, or float64 beside float64
  Activation activation;
  double negative_slope;
  const void* weight_hh;  // (H,)
  const void* h0;         // (B, H) or null
  const uint8_t* reset;   // (T, B) or null
  int64_t reset_stride_t, reset_stride_b;
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

#define RECATTN_DECLARE(isa)                      \
  namespace isa {                                 \
  void indrnn_forward(const IndrnnForward& p);    \
  void indrnn_backward(const IndrnnBackward& p);  \
  void gemm(const Gemm& p);                       \
  void column_sum(const ColumnSum& p);            \
  }

RECATTN_DECLARE(isa_base)
#ifdef __x86_64__
RECATTN_DECLARE(isa_v3)
RECATTN_DECLARE(isa_v4)
#endif
#undef RECATTN_DECLARE

}  // namespace recattn
