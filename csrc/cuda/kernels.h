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

void indrnn_forward(const IndrnnForward& p, cudaStream_t stream);
void indrnn_backward(const IndrnnBackward& p, cudaStream_t stream);
// Of the two functions above, where p.scan; the sums over the batch are left out.
void indrnn_forward_scan(const IndrnnForward& p, cudaStream_t stream);
void indrnn_backward_scan(const IndrnnBackward& p, cudaStream_t stream);

}  // namespace recattn
