// Runs CUDA kernels on a CPU, for tests: with this folder before the others on the include path a C++ compiler takes
// csrc/cuda/*.cu and bindings_*.cpp as they are. Every thread of a block is a context of its own, and they take turns
// in a random order wherever one waits, so that a kernel that leaves out a barrier computes nonsense sooner or later.
// Blocks of a cooperative launch and those of a cluster take part in this, in some launches with some as far ahead of
// others as barriers let them; others, and clusters, come one after the other, in a random order. Shared memory begins
// as NaN and ends where the launch says, with a page that must not be touched behind it; nobody may write to it before
// its block has begun or after it has ended.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned size() const { return x * y * z; }
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};

namespace emulation {

constexpr size_t STACK = 1 << 16, PAGE = 4096;

struct Thread;

// Threads that wait for each other.
struct Barrier {
  size_t size = 0;
  std::vector<Thread*> waiting;
};

// Blocks that reach each other's shared memory. Their barrier is passed in two steps.
struct Cluster {
  size_t threads = 0, arrived = 0;
  long phase = 0;  // how often all have arrived
  std::vector<struct Block*> blocks;
  std::vector<Thread*> waiting;
};

struct Warp {
  Barrier barrier;
  uint32_t a[32][4], b[32][2];  // the operands of a matrix instruction, by lane
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  long last_true = 0;  // of the votes, counted from 1, the last that somebody was for
  Cluster* cluster = nullptr;
  size_t running;  // threads that have not ended
  bool begun = false;
  char *mapping = nullptr, *shared = nullptr;
  size_t mapped = 0;

  Block(unsigned threads, size_t bytes) : warps((threads + 31) / 32), running(threads) {
    barrier.size = threads;
    for (Warp& warp : warps) warp.barrier.size = 32;
    const size_t payload = (bytes + PAGE - 1) / PAGE * PAGE;
    mapped = payload + PAGE;
    mapping = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapping + payload, PAGE, PROT_NONE);
    shared = mapping + payload - (bytes + 15) / 16 * 16;
    clear();
  }
  void clear() { memset(mapping, 0xff, mapped - PAGE); }
  bool is_clear() const {
    return std::all_of(mapping, mapping + mapped - PAGE, [](char byte) { return byte == char(0xff); });
  }
  Block(const Block&) = delete;
  ~Block() { munmap(mapping, mapped); }
};

// A copy to shared memory that comes no sooner than somebody waits for it, or at once.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  ucontext_t context;
  Block* block;
  unsigned block_index, index;
  long seen = -1;  // how many releases there had been when it last looked
  long votes = 0, arrivals = 0, waits = 0;  // the last two: at the barrier of the cluster
  std::deque<std::vector<Copy>> copies;  // in groups, the last of which is not yet complete
};

inline ucontext_t scheduler;
inline Thread* current = nullptr;
inline std::function<void()> body;
inline std::vector<Thread*> ready, spinning;
inline long releases = 0;
inline const char* broken = nullptr;  // what a thread did that no kernel may

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

inline void cluster_arrive() {
  Cluster* cluster = current->block->cluster;
  if (cluster == nullptr || current->arrivals++ != current->waits) {
    broken = "an arrival outside of a cluster, or before the last was waited for";
    return;
  }
  if (++cluster->arrived < cluster->threads) return;
  cluster->arrived = 0;
  ++cluster->phase;
  resume(cluster->waiting);
}
inline void cluster_wait() {
  Cluster* cluster = current->block->cluster;
  if (cluster == nullptr || ++current->waits != current->arrivals) {
    broken = "a wait at a cluster's barrier without an arrival";
    return;
  }
  if (cluster->phase >= current->waits) return;
  cluster->waiting.push_back(current);
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
  Block& block = *current->block;
  const bool first = !std::exchange(block.begun, true);
  if (first && !block.is_clear()) broken = "shared memory is written before its block begins";
  body();
  if (current->arrivals != current->waits) broken = "a thread ends between arrival and wait";
  if (--block.running == 0) block.clear();
  yield();
}

}  // namespace emulation

inline dim3 threadIdx, blockIdx;

inline void __syncthreads() { emulation::wait(emulation::current->block->barrier); }
inline int __syncthreads_or(int vote) {
  emulation::Block& block = *emulation::current->block;
  const long number = ++emulation::current->votes;
  if (vote) block.last_true = number;
  __syncthreads();
  const int result = block.last_true == number;
  __syncthreads();
  return result;
}
inline void __syncwarp() { emulation::wait(emulation::current->block->warps[emulation::current->index / 32].barrier); }

namespace emulation {

inline std::mt19937 random(0);

// `blocks` blocks, from number `first` on, at the same time, as a cluster or as what a grid has.
inline void run(unsigned first, unsigned blocks, dim3 grid, dim3 block, size_t shared, bool clustered = false) {
  const unsigned threads = block.size();
  Cluster cluster;
  cluster.threads = size_t(blocks) * threads;
  std::vector<std::unique_ptr<Block>> memory;
  std::vector<Thread> all(size_t(blocks) * threads);
  std::unique_ptr<char[]> stacks(new char[all.size() * STACK]);
  for (unsigned b = 0; b < blocks; ++b) {
    memory.push_back(std::make_unique<Block>(threads, shared));
    cluster.blocks.push_back(memory.back().get());
    if (clustered) memory.back()->cluster = &cluster;
  }
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
    threadIdx = dim3(current->index % block.x, current->index / block.x);
    blockIdx = dim3((first + current->block_index) % grid.x, (first + current->block_index) / grid.x);
    swapcontext(&scheduler, &current->context);
  }
  const auto stuck = [](const std::unique_ptr<Block>& block) {
    return !block->barrier.waiting.empty() ||
           std::any_of(block->warps.begin(), block->warps.end(), [](Warp& w) { return !w.barrier.waiting.empty(); });
  };
  if (!spinning.empty() || !cluster.waiting.empty() || std::any_of(memory.begin(), memory.end(), stuck)) {
    broken = "threads wait for what never comes";
  } else if (!std::all_of(memory.begin(), memory.end(), [](const auto& block) { return block->is_clear(); })) {
    broken = "shared memory is written after its block has ended";
  }
  if (const char* what = std::exchange(broken, nullptr)) throw std::runtime_error(std::string("emulation: ") + what);
}

}  // namespace emulation

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
using cudaStream_t = struct Stream*;

namespace emulation {

// Bytes that a block may have: once its kernel has been allowed as many, and without that.
constexpr int SHARED = 232448, SHARED_UNASKED = 48 << 10;
constexpr int MULTIPROCESSORS = 1;
// Blocks that a cluster may have: on every GPU that has clusters, and where a kernel has been allowed more.
constexpr unsigned CLUSTER_PORTABLE = 8, CLUSTER = 16;
inline std::map<const void*, size_t> allowed;
inline std::set<const void*> not_portable;
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
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::MULTIPROCESSORS : emulation::SHARED;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    emulation::not_portable.insert(kernel);
    return emulation::fail_unless(value == 1);
  }
  emulation::allowed[kernel] = size_t(value);
  return emulation::fail_unless(value >= 0 && value <= emulation::SHARED);
}
struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  found->ptxVersion = 90;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

template <class... P, size_t... I>
void call_kernel(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<P*>(arguments[I])...);
}

namespace emulation {

// Prepares the launch of a kernel that the hardware would take.
template <class... P>
cudaError_t prepare(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t shared) {
  const size_t most = std::max(size_t(SHARED_UNASKED), allowed[reinterpret_cast<const void*>(kernel)]);
  if (grid.size() == 0 || block.size() % 32 != 0 || block.size() > 1024 || shared > most) return fail_unless(false);
  body = [=] { call_kernel(kernel, arguments, std::make_index_sequence<sizeof...(P)>()); };
  return cudaSuccess;
}

}  // namespace emulation

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  const cudaError_t error = emulation::prepare(kernel, grid, block, arguments, shared);
  if (error != cudaSuccess) return error;
  std::vector<unsigned> order(grid.size());
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), emulation::random);
  for (unsigned b : order) emulation::run(b, 1, grid, block, shared);
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim{}, blockDim{};
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// With one attribute.
template <class... P>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), P... arguments) {
  void* pointers[] = {&arguments...};
  const dim3 grid = config->gridDim, block = config->blockDim;
  const size_t shared = config->dynamicSmemBytes;
  const cudaError_t error = emulation::prepare(kernel, grid, block, pointers, shared);
  if (error != cudaSuccess || config->numAttrs != 1) return emulation::fail_unless(false);
  if (config->attrs->id == cudaLaunchAttributeCooperative) {
    emulation::run(0, grid.size(), grid, block, shared);
    return cudaSuccess;
  }
  const auto [x, y, z] = config->attrs->val.clusterDim;
  const bool any = emulation::not_portable.count(reinterpret_cast<const void*>(kernel)) > 0;
  const unsigned most = any ? emulation::CLUSTER : emulation::CLUSTER_PORTABLE;
  if (x == 0 || x > most || y != 1 || z != 1 || grid.x % x != 0) return emulation::fail_unless(false);
  std::vector<unsigned> order(grid.size() / x);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), emulation::random);
  for (unsigned cluster : order) emulation::run(cluster * x, x, grid, block, shared, true);
  return cudaSuccess;
}
