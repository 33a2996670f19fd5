// Runs CUDA kernels on a CPU, for tests: with this folder before the others on the include path a C++ compiler takes
// csrc/cuda/gated_*.cu and bindings.cpp as they are. Every thread of every block is a context of its own, and they take
// turns in a random order wherever one waits, in some launches with some blocks as far ahead of others as barriers let
// them, so that a kernel that leaves out a barrier computes nonsense sooner or later. Shared memory begins as NaN and
// ends where the launch says, with a page that must not be touched behind it.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};

namespace emulation {

constexpr size_t STACK = 1 << 16;

struct Thread;

// Threads that wait for each other.
struct Barrier {
  size_t size = 0;
  std::vector<Thread*> waiting;
};

struct Warp {
  Barrier barrier;
  uint32_t a[32][4], b[32][2];  // the operands of a matrix instruction, by lane
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  char *mapping = nullptr, *shared = nullptr;
  size_t mapped = 0;

  Block(unsigned threads, size_t bytes) : warps((threads + 31) / 32) {
    barrier.size = threads;
    for (Warp& warp : warps) warp.barrier.size = 32;
    const size_t page = 4096, payload = (bytes + page - 1) / page * page;
    mapped = payload + page;
    mapping = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapping + payload, page, PROT_NONE);
    shared = mapping + payload - (bytes + 15) / 16 * 16;
    memset(mapping, 0xff, payload);
  }
  Block(const Block&) = delete;
  ~Block() { munmap(mapping, mapped); }
};

struct Thread {
  ucontext_t context;
  Block* block;
  unsigned block_index, index;
  long seen = -1;  // how many releases there had been when it last looked
};

inline ucontext_t scheduler;
inline Thread* current = nullptr;
inline std::function<void()> body;
inline std::vector<Thread*> ready, spinning;
inline long releases = 0;

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void resume(std::vector<Thread*>& threads) {
  ready.insert(ready.end(), threads.begin(), threads.end());
  threads.clear();
}

inline void wait(Barrier& barrier) {
  barrier.waiting.push_back(current);
  if (barrier.waiting.size() == barrier.size) resume(barrier.waiting);
  yield();
}

// What a thread that looks again and again waits for.
inline void release() {
  ++releases;
  resume(spinning);
}
inline void look() {
  if (current->seen == releases) {
    spinning.push_back(current);
    yield();
  }
  current->seen = releases;
}

inline void enter() {
  body();
  yield();
}

}  // namespace emulation

inline dim3 threadIdx, blockIdx;

inline void __syncthreads() { emulation::wait(emulation::current->block->barrier); }
inline void __syncwarp() { emulation::wait(emulation::current->block->warps[emulation::current->index / 32].barrier); }

namespace emulation {

inline void run(unsigned blocks, unsigned threads, size_t shared, std::function<void()> kernel) {
  static std::mt19937 random(0);
  body = std::move(kernel);
  std::vector<std::unique_ptr<Block>> memory;
  std::vector<Thread> all(size_t(blocks) * threads);
  std::unique_ptr<char[]> stacks(new char[all.size() * STACK]);
  for (unsigned b = 0; b < blocks; ++b) memory.push_back(std::make_unique<Block>(threads, shared));
  ready.clear();
  spinning.clear();
  for (size_t i = 0; i < all.size(); ++i) {
    Thread& thread = all[i];
    thread.block_index = unsigned(i / threads);
    thread.index = unsigned(i % threads);
    thread.block = memory[thread.block_index].get();
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks.get() + i * STACK;
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
    ready.push_back(&thread);
  }
  std::vector<unsigned> rank(blocks);
  std::generate(rank.begin(), rank.end(), [] { return random(); });
  const int draws = random() % 2 ? 1 : 8;  // the thread of the first block among so many is next
  while (!ready.empty()) {
    size_t next = random() % ready.size();
    for (int i = 1; i < draws; ++i) {
      const size_t other = random() % ready.size();
      if (rank[ready[other]->block_index] < rank[ready[next]->block_index]) next = other;
    }
    std::swap(ready[next], ready.back());
    current = ready.back();
    ready.pop_back();
    threadIdx.x = current->index;
    blockIdx.x = current->block_index;
    swapcontext(&scheduler, &current->context);
  }
  const auto stuck = [](const std::unique_ptr<Block>& block) {
    return !block->barrier.waiting.empty() ||
           std::any_of(block->warps.begin(), block->warps.end(), [](Warp& w) { return !w.barrier.waiting.empty(); });
  };
  if (!spinning.empty() || std::any_of(memory.begin(), memory.end(), stuck)) {
    throw std::runtime_error("emulation: threads wait for what never comes");
  }
}

}  // namespace emulation

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
using cudaStream_t = struct Stream*;

namespace emulation {

constexpr int SHARED = 232448;  // bytes that a block may have, once its kernel has been allowed as many
inline std::map<const void*, size_t> allowed;
inline cudaError_t last = cudaSuccess;

inline cudaError_t fail_unless(bool good) {
  if (good) return cudaSuccess;
  return last = cudaErrorInvalidValue;
}

}  // namespace emulation

inline cudaError_t cudaGetLastError() { return std::exchange(emulation::last, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::SHARED;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  emulation::allowed[kernel] = size_t(bytes);
  return emulation::fail_unless(bytes >= 0 && bytes <= emulation::SHARED);
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

template <class... P, size_t... I>
void call_kernel(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<P*>(arguments[I])...);
}

template <class... P>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t shared,
                                        cudaStream_t) {
  const bool fits = shared <= emulation::allowed[reinterpret_cast<const void*>(kernel)];
  if (grid.x == 0 || block.x % 32 != 0 || !fits) return emulation::fail_unless(false);
  emulation::run(grid.x, block.x, shared,
                 [=] { call_kernel(kernel, arguments, std::make_index_sequence<sizeof...(P)>()); });
  return cudaSuccess;
}
