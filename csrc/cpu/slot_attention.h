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

// Of every slot, in their order, something that begins `step` elements of R after the one before.
struct Slots {
  const void* data = nullptr;  // null: absent
  int64_t step = 0;
};

// R is float, or double beside float64 rows.
struct SlotAttention {
  int64_t B, heads, K, N, D, Dv;
  bool wide;  // R is double
  double scale, eps;
  bool denominator, joint;
  int threads;
  Slots q;                    // (B, heads, K) of D each
  Rows k, v;                  // v absent: it is k
  Slots bias;                 // (B, heads, K), or absent
  const uint8_t* slot_mask;   // (B, K) or null
  const uint8_t* input_mask;  // (B, N) or null
};

struct SlotAttentionForward : SlotAttention {
  void *updates, *den;  // (B, heads, K, Dv), (B, heads, K) of R
  Rows attn;            // (B, heads, K, N), or absent
};

// Of `times` calls with the same k and v; where these are more than one neither grad_attn nor the gradients of slots.
struct SlotAttentionBackward : SlotAttention {  // q and bias (times, B, heads, K)
  int64_t times;
  Slots updates, den;        // (times, B, heads, K), of Dv each, and of one
  Slots grad_updates;        // as updates, or absent
  Rows grad_attn;            // (B, heads, K, N), or absent
  Rows grad_k, grad_v;       // absent: not wanted; grad_k has the gradient of both where v is k
  bool add;                  // to what grad_k and grad_v hold
  void *grad_q, *grad_bias;  // of R; null: not wanted
};

RECATTN_DECLARE(slot_attention_forward, SlotAttentionForward)
RECATTN_DECLARE(slot_attention_backward, SlotAttentionBackward)

}  // namespace recattn
