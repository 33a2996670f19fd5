// What the kernels of slot attention take: bindings_slot_attention.cpp fills these structs from Python. Plain data: it
// is the same in every namespace.
//
//   A[k, n] = softmax over k of scale * q[k] . k[n] + bias[k]     (joint: over the heads' k together)
//   updates[k] = sum over n of (A[k, n] + eps) v[n] / den[k]      den[k] = sum over n of (A[k, n] + eps)
//   denominator:  sum over n of A[k, n] v[n] / den[k]             den[k] = eps + sum over n of A[k, n]
#pragma once

#include "isa.h"

namespace recattn {

// (B, heads, N, width), each row contiguous; strides in elements.
struct Rows {
  void* data = nullptr;  // null: absent
  Dtype dtype = Dtype::float32;
  int64_t stride_b = 0, stride_h = 0, stride_n = 0;
};

// R is float, or double beside float64 rows.
struct SlotAttention {
  int64_t B, heads, K, N, D, Dv;
  bool wide;  // R is double
  double scale, eps;
  bool denominator, joint;
  int threads;
  const void* q;              // (B, heads, K, D) of R
  Rows k, v;                  // v absent: it is k
  const void* bias;           // (B, heads, K) of R, or null
  const uint8_t* slot_mask;   // (B, K) or null
  const uint8_t* input_mask;  // (B, N) or null
};

struct SlotAttentionForward : SlotAttention {
  void *updates, *den;  // (B, heads, K, Dv), (B, heads, K) of R
  Rows attn;            // (B, heads, K, N), or absent
};

struct SlotAttentionBackward : SlotAttention {
  const void *updates, *den;
  const void* grad_updates;  // (B, heads, K, Dv) of R, or null
  Rows grad_attn;            // (B, heads, K, N), or absent
  Rows grad_k, grad_v;       // absent: not wanted; grad_k has the gradient of both where v is k
  void *grad_q, *grad_bias;  // of R; null: not wanted
};

RECATTN_DECLARE(slot_attention_forward, SlotAttentionForward)
RECATTN_DECLARE(slot_attention_backward, SlotAttentionBackward)

}  // namespace recattn
