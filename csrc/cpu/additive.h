// What the kernels of additive attention take: bindings_additive.cpp fills these structs from Python. Plain data: it is
// the same in every namespace.
#pragma once

#include "../cells.h"
#include "isa.h"

namespace recattn {

// A (B, N, width) tensor; the last dimension is contiguous. Strides are in elements.
struct Positions {
  const void* data = nullptr;
  int64_t stride_b = 0, stride_n = 0;
  Dtype dtype = Dtype::float32;
};

// R is float or double; where nothing else is said tensors are R and contiguous.
struct Additive {
  int64_t B, N, A, D;
  bool wide;              // R is double, and so are keys and values
  Activation activation;  // tanh or relu
  Positions keys, values;  // (B, N, A), (B, N, D)
  const void *query, *weight;  // (B, A), (A,)
  const uint8_t* mask;         // (B, N) or null
  int64_t mask_stride_b, mask_stride_n;
  int threads;
};

struct AdditiveForward : Additive {
  void *softmax, *context;  // (B, N), (B, D)
};

// The gradients that are wanted; the others are null. Those of keys and values have their dtype.
struct AdditiveBackward : Additive {
  static constexpr int64_t ROWS = 32;  // positions whose shares of dquery and dweight are summed at a time

  const void* softmax;                     // (B, N)
  const void *grad_context, *grad_weights;  // (B, D), (B, N); or null
  void* scores;                            // (B, N) scratch: what arrives at the softmax, then at the scores
  void* sums;  // (2, B, ceil(N / ROWS), A) scratch: of dquery and of dweight
  void *grad_query, *grad_keys, *grad_weight, *grad_values;
};

RECATTN_DECLARE(additive_forward, AdditiveForward)
RECATTN_DECLARE(additive_backward, AdditiveBackward)

}  // namespace recattn
