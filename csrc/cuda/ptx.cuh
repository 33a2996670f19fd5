// What the kernels ask of the machine beyond C++. csrc/tests/emulation has one of this name that does the same on
// a CPU: the kernels themselves are compiled there as they are.
#pragma once

#include "cuda/kernels.h"

namespace recattn {
namespace RECATTN_ISA {

__device__ inline char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

// 16 bytes that another multiprocessor may have written since the kernel began: never from the first-level cache.
__device__ inline uint4 load_exchanged(const void* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return v;
}

// The value that the lane has whose number differs in these bits.
__device__ inline float shuffle_xor(float v, int bits) { return __shfl_xor_sync(0xffffffffu, v, bits); }

// What holds this byte is on its way to the second-level cache, and nobody waits for it.
__device__ inline void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
}

// Whoever reads the counter by load_acquire and finds this count sees all that the block has written before it
// synchronised and one of its threads called this.
__device__ inline void count_release(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
}

__device__ inline unsigned load_acquire(const unsigned* counter) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(counter)) : "memory");
  return v;
}

// Where a block of the cluster has what this one has there in its shared memory, and the barrier of a cluster: whoever
// has waited sees what all threads of all its blocks have written before they arrived. A thread waits for each arrival
// before it arrives again. Where there are no clusters the plan has none.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline char* of_cluster(char* own, int rank) {
  uint64_t other;
  asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(own), "r"(rank));
  return reinterpret_cast<char*>(other);
}
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
#else
// What would follow is not compiled.
__device__ inline void no_cluster() {
  __trap();
  __builtin_unreachable();
}
__device__ inline char* of_cluster(char* own, int) {
  no_cluster();
  return own;
}
__device__ inline void cluster_arrive() { no_cluster(); }
__device__ inline void cluster_wait() { no_cluster(); }
#endif

// sum (16 x 8) += A (16 x K) B (K x 8) by a warp, K being 32 bytes. With row = lane / 4 and column = lane % 4 a lane
// has of A the words (row, column), (row + 8, column), (row, column + 4), (row + 8, column + 4), of B's columns the
// words (row, column), (row, column + 4), and of the sum (row, 2 column), (row, 2 column + 1), and those of row + 8.
// Architectures before sm_80 compile, for IndRNN's sake; the backend refuses them.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define RECATTN_MMA(name, shape, type)                                                                          \
  __device__ inline void name(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, \
                              uint32_t b1) {                                                                    \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                                        \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                         \
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                       \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                       \
  }
// The nearest of the numbers that a matrix unit multiplies as TF32.
__device__ inline float round_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits_to_float(bits);
}
#else
#define RECATTN_MMA(name, shape, type) \
  __device__ inline void name(float (&)[4], uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t) { __trap(); }
__device__ inline float round_tf32(float v) { return v; }
#endif
RECATTN_MMA(mma_bfloat16, "m16n8k16", "bf16")
RECATTN_MMA(mma_float16, "m16n8k16", "f16")
RECATTN_MMA(mma_tf32, "m16n8k8", "tf32")
#undef RECATTN_MMA

}  // namespace RECATTN_ISA
}  // namespace recattn
