// What both directions of the persistent kernels of rnn, lstm and gru share.
//
// One launch takes all steps. A block (slice, group) has some units of some rows of the batch, and their weights in
// shared memory. In each step it multiplies these by what all slices of its group have left in the exchange (the
// states, or on the way back the gradients of the gates), computes its own units from that, and leaves those there in
// turn: two places take turns, since a block may write the next while another still reads the last.
//
// The exchange has two forms. Across the grid, a group's is in global memory, and so is the count of how far its blocks
// have come, by release and acquire; the launch is cooperative, or a block might wait for one that has not begun. Where
// the hardware has thread-block clusters and one holds the group, each block has an exchange of its own in shared
// memory: what it leaves it stores in those of the others too, and the hardware's barrier of a cluster tells when all
// have. Groups then need not run at once.
//
// All meet once in a step, and once more in between for each mean over a row that a layer norm needs (gated_norm.cuh),
// and in gru_before for r * h, which is multiplied after h: the two then have one of the two places each.
#pragma once

#include "gated_product.cuh"
#include "launch.cuh"

namespace recattn {
namespace RECATTN_ISA {

constexpr bool is_gru(Cell c) { return c == Cell::gru || c == Cell::gru_before; }
constexpr int gates_of(Cell c) { return c == Cell::lstm ? 4 : is_gru(c) ? 3 : 1; }
constexpr int kept_of(Cell c) { return c == Cell::gru ? 4 : gates_of(c); }
// The second is the lstm's c; in gru_before what waits for the second of its products: z, or its gradient.
constexpr int states_of(Cell c) { return c == Cell::lstm || c == Cell::gru_before ? 2 : 1; }
// How often blocks exchange in a step what they multiply.
constexpr int turns_of(Cell c) { return c == Cell::gru_before ? 2 : 1; }

constexpr int SECTOR = 32;   // bytes that come from memory together
constexpr int COUNTER = 32;  // unsigned from one group's counter to the next: each has lines of the cache to itself

// Two numbers of a row of the batch, as of its normalisation.
struct Pair {
  float first, second;
};

// The pairs of one row that the slices leave are read two at a time.
RECATTN_FN int64_t pairs_of_row(const GatedPlan& plan) { return ceil_div(plan.slices, 2) * 2; }

// The bytes of the workspace: what is multiplied, what rows are normalised by, and counters.
RECATTN_FN int64_t exchange_bytes(const GatedPlan& plan, const Layout& layout) {
  return plan.cluster ? 0 : plan.groups * layout.group_bytes(plan);
}
RECATTN_FN int64_t pair_bytes(const GatedPlan& plan, const Layout& layout) {
  return int64_t(layout.met) * plan.groups * plan.rows * pairs_of_row(plan) * int64_t(sizeof(Pair));
}
RECATTN_FN int64_t counter_bytes(const GatedPlan& plan) {
  return plan.cluster ? 0 : plan.groups * COUNTER * int64_t(sizeof(unsigned));
}

enum class Exchange { across_grid, in_cluster };

// One unit of one row of the batch. It has the same thread in every step, if not in multiply() that of each_place().
struct Place {
  int64_t b, n;
  int row, unit;  // in the block
  bool inside;    // of the batch and of H
};

template <class E, Exchange X>
class Block {
  using Element = typename E::Element;
  static constexpr bool CLUSTER = X == Exchange::in_cluster;

 public:
  // In a cluster a block's rank is its slice.
  __device__ Block(const Gated& p, const Layout& layout, char* memory)
      : p_(p), group_(int(blockIdx.x) / p.plan.slices), slice_(int(blockIdx.x) % p.plan.slices),
        n0_(int64_t(slice_) * p.plan.units), b0_(p.first_row + int64_t(group_) * p.plan.rows),
        row_bytes_(layout.row_bytes),
        exchange_(CLUSTER ? memory + layout.exchange
                          : static_cast<char*>(p.workspace) + group_ * layout.group_bytes(p.plan)),
        pairs_(reinterpret_cast<Pair*>(static_cast<char*>(p.workspace) + exchange_bytes(p.plan, layout))),
        arrived_(reinterpret_cast<unsigned*>(reinterpret_cast<char*>(pairs_) + pair_bytes(p.plan, layout)) +
                 group_ * COUNTER) {
    if constexpr (CLUSTER) {
      // Past what is left a row is read too, times weights of 0. Nobody's memory is written before its block has begun.
      uint4* words = reinterpret_cast<uint4*>(exchange_);
      for (int i = threadIdx.x; i < layout.group_bytes(p.plan) / 16; i += BLOCK_THREADS) words[i] = uint4{};
      cluster_arrive();
      cluster_wait();
    }
  }

  __device__ const GatedPlan& plan() const { return p_.plan; }
  __device__ int slice() const { return slice_; }
  __device__ int64_t unit(int i) const { return n0_ + i; }
  // How many of the units of a slice are of H, and of the block's rows of the batch.
  __device__ int units_of(int slice) const {
    const int64_t left = p_.H - int64_t(slice) * p_.plan.units;
    return int(left < p_.plan.units ? left : p_.plan.units);
  }
  __device__ int rows() const {
    const int64_t left = p_.B - b0_;
    return int(left < 0 ? 0 : left < p_.plan.rows ? left : p_.plan.rows);
  }
  // Which of all the blocks' rows these are.
  __device__ int64_t row_block() const { return b0_ / p_.plan.rows; }
  // The i-th of the block's units and rows, in an order in which adjacent units are adjacent.
  __device__ Place place(int i) const {
    const int row = i / p_.plan.units, unit = i % p_.plan.units;
    const int64_t b = b0_ + row, n = n0_ + unit;
    return {b, n, row, unit, b < p_.B && n < p_.H};
  }

  // What the blocks of the group leave at a turn: rows, of which the inner dimension is contiguous.
  __device__ char* exchanged(int64_t turn, int row) const {
    return exchange_ + ((turn & 1) * p_.plan.rows + row) * row_bytes_;
  }
  __device__ void leave(int64_t turn, int row, int64_t k, float v) const {
    reinterpret_cast<Element*>(exchanged(turn, row))[k] = E::narrow(v);
  }

  // What the slices of the group leave of a row to normalise it, the `which`-th in a step.
  __device__ Pair* pairs(int which, int row) const {
    return pairs_ + ((int64_t(which) * p_.plan.groups + group_) * p_.plan.rows + row) * pairs_of_row(p_.plan);
  }

  // f(i, place) for each of the block's places.
  template <class F>
  __device__ void each_place(F f) const {
    for (int i = threadIdx.x; i < p_.plan.rows * p_.plan.units; i += BLOCK_THREADS) {
      const Place at = place(i);
      if (at.inside) f(i, at);
    }
  }
  // f(i, place, sum) with sum(row), that of a row of the weights with what was left at a turn, for each of the places.
  template <class F>
  __device__ void multiply(Product<E>& product, int64_t turn, const Part& part, F f) const {
    for (int row0 = 0; row0 < p_.plan.rows; row0 += BATCH) {
      const int rows = p_.plan.rows - row0 < BATCH ? p_.plan.rows - row0 : BATCH;
      if (row0 > 0) __syncthreads();
      product.template run<CLUSTER>(exchanged(turn, row0), rows / COLUMN_TILE, part);
      __syncthreads();
      for (int i = row0 * p_.plan.units + threadIdx.x; i < (row0 + rows) * p_.plan.units; i += BLOCK_THREADS) {
        const Place at = place(i);
        if (at.inside) f(i, at, [&](int row) { return product.sum(row, at.row - row0, part); });
      }
    }
  }

  // What the block has left is there for those who wait for it, but for that which is multiplied: arrive_with(). Every
  // arrival is waited for, and so a cluster's blocks end when nobody writes to them any more.
  __device__ void arrive() const {
    if constexpr (CLUSTER) {
      cluster_arrive();
    } else {
      __syncthreads();
      if (threadIdx.x == 0) count_release(arrived_);
    }
  }
  // And what it has left at a turn to be multiplied: its units, of some gates from a first one on.
  __device__ void arrive_with(int64_t turn, int gate, int gates) const {
    if constexpr (CLUSTER) {
      __syncthreads();
      const int64_t ends = (p_.H | n0_ | units_of(slice_)) * int64_t(sizeof(Element));
      if (ends % 16 == 0) {
        send<uint4>(turn, gate, gates);
      } else if (ends % 8 == 0) {
        send<uint64_t>(turn, gate, gates);
      } else if (ends % 4 == 0) {
        send<uint32_t>(turn, gate, gates);
      } else {
        send<Element>(turn, gate, gates);
      }
    }
    arrive();
  }
  // Until all blocks of the group have arrived as often as this one has waited, this time included.
  __device__ void wait() {
    if constexpr (CLUSTER) {
      cluster_wait();
    } else {
      expected_ += unsigned(p_.plan.slices);
      if (threadIdx.x == 0) {
        while (int(load_acquire(arrived_) - expected_) < 0) {  // the count may wrap around
        }
      }
      __syncthreads();
    }
  }

  // Steps that the row takes, and whether its state is zeroed before the one at t.
  __device__ int64_t steps(int64_t b) const {
    if (p_.lengths == nullptr || b >= p_.B) return p_.T;
    const int64_t length = p_.lengths[b];
    return length < 0 ? 0 : length > p_.T ? p_.T : length;
  }
  // Bytes are left as they are: to compare them with 0 is to wait for them.
  __device__ uint32_t resets(int64_t t, int64_t b) const {
    return p_.reset.data == nullptr ? 0 : p_.reset.data[t * p_.reset.stride_t + b * p_.reset.stride_b];
  }
  __device__ uint32_t keeps(const Mask& mask, int64_t t, const Place& at) const {
    return mask.data == nullptr ? 0 : mask.data[t * mask.stride_t + at.b * mask.stride_b + at.n];
  }
  // As they lie in memory, N numbers of a sequence of p.dtype from that of the place on, H apart. One branch for all:
  // the loads are under way together.
  template <int N>
  __device__ void fetch(const Sequence& s, int64_t t, const Place& at, uint32_t (&bits)[N]) const {
    const int64_t first = t * s.stride_t + at.b * s.stride_b + at.n;
    if (p_.dtype == Dtype::float32) {
#pragma unroll
      for (int g = 0; g < N; ++g) bits[g] = static_cast<const uint32_t*>(s.data)[first + g * p_.H];
    } else {
#pragma unroll
      for (int g = 0; g < N; ++g) bits[g] = static_cast<const uint16_t*>(s.data)[first + g * p_.H];
    }
  }
  // From a row on, as one of which a thread has more places than its first: N times the block's units of a step of a
  // sequence, H apart, on their way to the second-level cache while the block waits for the others. steps: of each row.
  template <int N>
  __device__ void prefetch_rows(const Sequence& s, Dtype dtype, int64_t t, const int* steps, int row0 = 0) const {
    const int element = dtype == Dtype::float32 ? 4 : 2;
    const int64_t left = p_.H - n0_, bytes = (left < p_.plan.units ? left : p_.plan.units) * element;
    for (int i = row0 * N + threadIdx.x; i < p_.plan.rows * N; i += BLOCK_THREADS) {
      const int row = i / N;
      const int64_t b = b0_ + row;
      if (b >= p_.B || t < 0 || t >= steps[row]) continue;
      const char* from =
          static_cast<const char*>(s.data) + (t * s.stride_t + b * s.stride_b + i % N * p_.H + n0_) * element;
#pragma unroll 1  // there are one or two of them as a rule
      for (int64_t at = 0; at < bytes; at += SECTOR) prefetch(from + at);
      prefetch(from + bytes - 1);
    }
  }
  // The value that is `gate` times H after that of the place.
  __device__ void put(const Sequence& s, int64_t t, const Place& at, float v, int gate = 0) const {
    store({s.data, p_.dtype}, t * s.stride_t + at.b * s.stride_b + gate * p_.H + at.n, v);
  }

 private:
  // To the others of the cluster, a word at a time. Each warp has others, and each block begins with the one after it.
  template <class Word>
  __device__ void send(int64_t turn, int gate, int gates) const {
    constexpr int N = sizeof(Word) / sizeof(Element);
    const int slices = p_.plan.slices, words = units_of(slice_) / N, lane = threadIdx.x % 32;
    char* from = exchanged(turn, 0) + (gate * p_.H + n0_) * int64_t(sizeof(Element));
    for (int next = 1 + int(threadIdx.x) / 32; next < slices; next += WARPS) {
      char* to = of_cluster(from, (slice_ + next) % slices);
      for (int i = lane; i < rows() * gates * words; i += 32) {
        const int word = i % words, g = i / words % gates, row = i / words / gates;
        const int64_t at = row * row_bytes_ + (g * p_.H + word * N) * int64_t(sizeof(Element));
        *reinterpret_cast<Word*>(to + at) = *reinterpret_cast<const Word*>(from + at);
      }
    }
  }

  const Gated& p_;
  const int group_, slice_;
  const int64_t n0_, b0_, row_bytes_;
  char* const exchange_;
  Pair* const pairs_;
  unsigned* const arrived_;
  unsigned expected_ = 0;
};

// What becomes of a state: the old one where the mask says so, else rate * old + (1 - rate) * fresh.
RECATTN_FN float zoneout(const Mask& mask, bool keep, float rate, float old, float fresh) {
  if (mask.data != nullptr) return keep ? old : fresh;
  return rate == 0.0f ? fresh : rate * old + (1.0f - rate) * fresh;
}

// The gradients of the old state and of the fresh one from that of what became of them.
struct Shares {
  float old, fresh;
};
RECATTN_FN Shares zoneout_backward(const Mask& mask, bool keep, float rate, float d) {
  if (mask.data != nullptr) return keep ? Shares{d, 0.0f} : Shares{0.0f, d};
  return rate == 0.0f ? Shares{0.0f, d} : Shares{rate * d, (1.0f - rate) * d};
}

// f<E, C, NORMED, X>(), C being that of both activations where the cell is an rnn.
template <class F>
void by_kernel(const Gated& p, F f) {
  const auto by_exchange = [&]<class E, Cell C, bool NORMED>() {
    return p.plan.cluster ? f.template operator()<E, C, NORMED, Exchange::in_cluster>()
                          : f.template operator()<E, C, NORMED, Exchange::across_grid>();
  };
  const auto by_norm = [&]<class E, Cell C>() {
    return p.ln_weight.data ? by_exchange.template operator()<E, C, true>()
                            : by_exchange.template operator()<E, C, false>();
  };
  const auto by_cell = [&]<class E>() {
    switch (p.cell) {
      case Cell::rnn_tanh:
      case Cell::rnn_relu: return by_norm.template operator()<E, Cell::rnn_tanh>();
      case Cell::lstm: return by_norm.template operator()<E, Cell::lstm>();
      case Cell::gru: return by_norm.template operator()<E, Cell::gru>();
      case Cell::gru_before: return by_exchange.template operator()<E, Cell::gru_before, false>();
    }
  };
  switch (p.weight_hh.dtype) {
    case Dtype::float32:
      return p.tf32 ? by_cell.template operator()<Tf32Product>() : by_cell.template operator()<Float32Product>();
    case Dtype::bfloat16: return by_cell.template operator()<BFloat16Product>();
    case Dtype::float16: return by_cell.template operator()<Float16Product>();
  }
}

// One launch for every slices * groups blocks' rows of the batch.
template <class P>
void launch_gated(void (*kernel)(P, Layout), P p, Layout layout, cudaStream_t stream, const char* what) {
  const GatedPlan& plan = p.plan;
  const int64_t workspace = exchange_bytes(plan, layout) + pair_bytes(plan, layout) + counter_bytes(plan);
  if (layout.bytes != plan.shared || workspace != plan.workspace) {
    throw std::runtime_error(std::string(what) + " and its launch plan count different bytes");
  }
  // The device's maximum, not layout.bytes: another thread may be about to launch the same kernel with more.
  int device = 0, most = 0;
  check(cudaGetDevice(&device), what);
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), what);
  const void* address = reinterpret_cast<const void*>(kernel);
  check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, most), what);
  cudaLaunchAttribute form{};
  if (plan.cluster) {
    form.id = cudaLaunchAttributeClusterDimension;
    form.val.clusterDim.x = unsigned(plan.slices);
    form.val.clusterDim.y = form.val.clusterDim.z = 1;
    check(cudaFuncSetAttribute(address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), what);
  } else {
    form.id = cudaLaunchAttributeCooperative;
    form.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.slices * plan.groups));
  config.blockDim = dim3(BLOCK_THREADS);
  config.dynamicSmemBytes = size_t(layout.bytes);
  config.stream = stream;
  config.attrs = &form;
  config.numAttrs = 1;
  for (p.first_row = 0; p.first_row < p.B; p.first_row += int64_t(plan.groups) * plan.rows) {
    if (!plan.cluster) check(cudaMemsetAsync(p.workspace, 0, size_t(plan.workspace), stream), what);
    check(cudaLaunchKernelEx(&config, kernel, p, layout), what);
  }
}

}  // namespace RECATTN_ISA
}  // namespace recattn
