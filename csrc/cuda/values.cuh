// Numbers in memory and in registers: the 16-bit types, tensors whose type is known when the kernel runs, and sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace recattn {
namespace RECATTN_ISA {

// The 16-bit types.
struct BFloat16 : BFloat16Limits {
  static __device__ float load(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }
  static __device__ uint16_t store(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
};

struct Float16 : Float16Limits {
  static __device__ float load(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  static __device__ uint16_t store(float v) { return __half_as_ushort(__float2half_rn(v)); }
};

// A number as it lies in memory, and its value: whoever keeps them apart waits for memory only at the second.
__device__ inline uint32_t bits_at(const Plain& x, int64_t i) {
  if (x.data == nullptr) return 0;
  if (x.dtype == Dtype::float32) return static_cast<const uint32_t*>(x.data)[i];
  return static_cast<const uint16_t*>(x.data)[i];
}
__device__ inline float value_of(uint32_t bits, Dtype dtype) {
  if (dtype == Dtype::float32) return bits_to_float(bits);
  return dtype == Dtype::bfloat16 ? BFloat16::load(uint16_t(bits)) : Float16::load(uint16_t(bits));
}

__device__ inline float load(const Plain& x, int64_t i) { return value_of(bits_at(x, i), x.dtype); }

__device__ inline void store(const Plain& x, int64_t i, float v) {
  if (x.data == nullptr) return;
  if (x.dtype == Dtype::float32) {
    static_cast<float*>(x.data)[i] = v;
  } else {
    static_cast<uint16_t*>(x.data)[i] = x.dtype == Dtype::bfloat16 ? BFloat16::store(v) : Float16::store(v);
  }
}

// A sum over many steps, with what rounding has lost of it.
struct Sum {
  float total = 0.0f, lost = 0.0f;
  __device__ void add(float part) {
    const float after = total + part, came = after - total;
    lost += (total - (after - came)) + (part - came);
    total = after;
  }
  __device__ float value() const { return fabsf(total) <= 3.4028234e38f ? total + lost : total; }
};

}  // namespace RECATTN_ISA
}  // namespace recattn
