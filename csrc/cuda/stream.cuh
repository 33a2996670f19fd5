// Reading a sequence step by step with many steps in flight.
//
// A recurrence knows every address beforehand, but each thread has one step to do at a time: left to itself it would
// wait for memory at every step. Each thread therefore copies its own column ahead into a ring in shared memory
// (cp.async), CHUNK steps a group. Nothing is shared between threads, so nothing is synchronised.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/ptx.cuh"
#include "cuda/values.cuh"

namespace recattn {
namespace RECATTN_ISA {

// What a thread reads and writes at a step: COLUMNS adjacent columns in one Word. cp.async takes 4 bytes or more.
struct One32 {
  using Word = float;
  static constexpr int COLUMNS = 1;
  static constexpr bool ASYNC = true;
  static __device__ void unpack(Word w, float (&v)[1]) { v[0] = w; }
  static __device__ Word pack(const float (&v)[1]) { return v[0]; }
  template <Activation A>
  static __device__ float inside(float h) { return h; }
};

template <class S>
struct Two16 {
  using Word = uint32_t;
  static constexpr int COLUMNS = 2;
  static constexpr bool ASYNC = true;
  static __device__ void unpack(Word w, float (&v)[2]) {
    v[0] = S::load(uint16_t(w));
    v[1] = S::load(uint16_t(w >> 16));
  }
  static __device__ Word pack(const float (&v)[2]) { return S::store(v[0]) | uint32_t(S::store(v[1])) << 16; }
  template <Activation A>
  static __device__ float inside(float h) { return keep_inside<A, S>(h); }
};

template <class S>
struct One16 {
  using Word = uint16_t;
  static constexpr int COLUMNS = 1;
  static constexpr bool ASYNC = false;
  static __device__ void unpack(Word w, float (&v)[1]) { v[0] = S::load(w); }
  static __device__ Word pack(const float (&v)[1]) { return S::store(v[0]); }
  template <Activation A>
  static __device__ float inside(float h) { return keep_inside<A, S>(h); }
};

constexpr int THREADS = 32;  // of a block: a multiprocessor takes enough of them, and few columns spread over many
constexpr int CHUNK = 16;    // steps in one group of copies
// Chunks in the ring. Few columns cannot fill the machine otherwise than by depth; many must not use up shared memory.
// The hardware tells no more than 8 pending groups apart.
constexpr int DEEP = 8, SHALLOW = 2;
constexpr size_t CHUNK_BYTES = 4 * CHUNK * THREADS;

// Waits for the oldest of `depth` groups of copies.
__device__ inline void wait_chunk(int depth) {
  if (depth == DEEP) {
    __pipeline_wait_prior(DEEP - 1);
  } else {
    __pipeline_wait_prior(SHALLOW - 1);
  }
  asm volatile("" ::: "memory");  // the wait itself does not keep the compiler from reading the ring before it
}

// A pointer that walks over a sequence at one column, in the order in which steps are taken.
template <class Word>
struct Walk {
  Word* at = nullptr;
  int64_t next = 0;
  Walk() = default;
  __device__ Walk(void* data, int64_t offset, int64_t stride_t, int64_t element, int64_t T, bool backwards) {
    if (data == nullptr) return;
    const int64_t first = backwards ? (T - 1) * stride_t : 0;
    at = reinterpret_cast<Word*>(static_cast<char*>(data) + (offset + first) * element);
    next = (backwards ? -stride_t : stride_t) * element;
  }
  __device__ void advance(int64_t steps = 1) {
    at = reinterpret_cast<Word*>(reinterpret_cast<char*>(at) + steps * next);
  }
};

// The steps [0, end) of a walk, CHUNK at a time: `copy` starts the next chunk on its way, `read` takes the oldest. A walk
// over nothing, if OPTIONAL, reads as zeros.
template <class Word, bool ASYNC, bool OPTIONAL>
class Stream {
 public:
  __device__ Stream(Walk<Word> walk, int64_t end, void* ring, int depth)
      : walk_(walk), left_(end), ring_(static_cast<Word*>(ring) + threadIdx.x), depth_(depth) {}

  __device__ bool absent() const { return OPTIONAL && walk_.at == nullptr; }

  __device__ void copy() {
    if (absent()) return;
    const int count = left_ < CHUNK ? int(left_) : CHUNK;
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      if (i < count) {
        if constexpr (ASYNC) {
          __pipeline_memcpy_async(ring_ + (into_ * CHUNK + i) * THREADS, walk_.at, sizeof(Word));
        } else {
          ahead_[i] = *walk_.at;
        }
      }
      walk_.advance();
    }
    left_ -= CHUNK;
    into_ = into_ + 1 == depth_ ? 0 : into_ + 1;
  }

  __device__ void read(Word (&words)[CHUNK]) {
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      if constexpr (ASYNC) {
        words[i] = absent() ? Word(0) : ring_[(from_ * CHUNK + i) * THREADS];
      } else {
        words[i] = absent() ? Word(0) : ahead_[i];
      }
    }
    from_ = from_ + 1 == depth_ ? 0 : from_ + 1;
  }

 private:
  Walk<Word> walk_;
  int64_t left_;
  Word* ring_;
  int depth_, into_ = 0, from_ = 0;
  Word ahead_[ASYNC ? 1 : CHUNK] = {};
};

}  // namespace RECATTN_ISA
}  // namespace recattn
