// In the place of csrc/cuda/ptx.cuh where a CPU runs the kernels.
#pragma once

#include "cuda/kernels.h"
#include "cuda/values.cuh"

namespace recattn {
namespace RECATTN_ISA {

inline char* shared_memory() { return emulation::current->block->shared; }

inline uint4 load_exchanged(const void* from) {
  uint4 v;
  memcpy(&v, __builtin_assume_aligned(from, 16), 16);
  return v;
}

inline float shuffle_xor(float v, int bits) {
  emulation::Warp& warp = emulation::current->block->warps[threadIdx.x / 32];
  warp.a[threadIdx.x % 32][0] = float_to_bits(v);
  __syncwarp();
  const float other = bits_to_float(warp.a[threadIdx.x % 32 ^ bits][0]);
  __syncwarp();
  return other;
}

inline void prefetch(const void* from) { (void)*static_cast<const volatile char*>(from); }

inline void count_release(unsigned* counter) {
  ++*counter;
  emulation::release();
}
inline unsigned load_acquire(const unsigned* counter) {
  emulation::look();
  return *counter;
}

inline char* of_cluster(char* own, int rank) {
  const emulation::Block& block = *emulation::current->block;
  if (block.cluster == nullptr || size_t(rank) >= block.cluster->blocks.size()) {
    emulation::broken = "an address in a block that the cluster has not";
    return own;
  }
  return block.cluster->blocks[size_t(rank)]->shared + (own - block.shared);
}
inline void cluster_arrive() { emulation::cluster_arrive(); }
inline void cluster_wait() { emulation::cluster_wait(); }

// value(word, i): the i-th of the N numbers in a word.
template <int N, float (*VALUE)(uint32_t, int)>
void mma(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const int lane = int(threadIdx.x % 32);
  emulation::Warp& warp = emulation::current->block->warps[threadIdx.x / 32];
  const uint32_t a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
  memcpy(warp.a[lane], a, sizeof a);
  memcpy(warp.b[lane], b, sizeof b);
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, half = i / 2, column = lane % 4 * 2 + i % 2;
    double total = 0;
    for (int word = 0; word < 8; ++word) {
      for (int k = 0; k < N; ++k) {
        total += double(VALUE(warp.a[row * 4 + word % 4][half + word / 4 * 2], k)) *
                 VALUE(warp.b[column * 4 + word % 4][word / 4], k);
      }
    }
    sum[i] += float(total);
  }
  __syncwarp();
}

inline float bfloat16_of(uint32_t word, int i) { return BFloat16::load(uint16_t(word >> 16 * i)); }
inline float float16_of(uint32_t word, int i) { return Float16::load(uint16_t(word >> 16 * i)); }
inline float tf32_of(uint32_t word, int) { return bits_to_float(word & 0xffffe000u); }

constexpr auto mma_bfloat16 = mma<2, bfloat16_of>;
constexpr auto mma_float16 = mma<2, float16_of>;
constexpr auto mma_tf32 = mma<1, tf32_of>;

inline float round_tf32(float v) {
  return v != v ? v : bits_to_float((float_to_bits(v) + 0x1000u) & 0xffffe000u);
}

}  // namespace RECATTN_ISA
}  // namespace recattn
