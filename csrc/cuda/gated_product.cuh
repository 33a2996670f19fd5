// The product of a persistent kernel, sum (rows, batch) = weights (rows, inner) states (inner, batch), in one block:
// weights stay in shared memory over all time, states come from the other blocks, through the second-level cache or,
// in a cluster, through shared memory.
//
// Each warp takes some segments of the inner dimension and adds up every result over them; the warps' parts are added
// where they are used. A row of a segment is 64 bytes, 16 in each of four lanes, of the weights as of the states: two
// matrix instructions. Which element of it they take for which of their own does not matter as long as it is the same
// in both, and so no lane ever needs another's.
#pragma once

#include "cuda/ptx.cuh"
#include "cuda/values.cuh"

namespace recattn {
namespace RECATTN_ISA {

constexpr int WARPS = 8, BLOCK_THREADS = 32 * WARPS;
constexpr int ROW_TILE = 16, COLUMN_TILE = 8;   // of a matrix instruction's result
constexpr int ROW_TILES = 4, COLUMN_TILES = 4;  // of the results that a warp holds at once
constexpr int BATCH = COLUMN_TILE * COLUMN_TILES;
constexpr int SEGMENT = 64;  // bytes
constexpr int AHEAD = 2;     // segments of states on their way at once, of a warp

RECATTN_FN int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The inputs of a product: how they are rounded to, and how a warp multiplies a segment of one tile of rows (low: its
// first 8, high: the others) with one of columns.
template <void (*MMA)(float (&)[4], uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t)>
struct Tensor {
  static constexpr int STAGE = 0;

  // Where a row's quarter lies among the 64 of a tile's segment.
  static __device__ int position(int row, int quarter) { return row / 8 * 32 + row % 8 * 4 + quarter; }

  static __device__ void multiply(float (&sum)[ROW_TILES][COLUMN_TILES][4], const uint4* weights, int64_t tile_stride,
                                  int row_tiles, const uint4 (&states)[COLUMN_TILES], int column_tiles, uint4*) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      if (m < row_tiles) {
        const uint4 low = weights[m * tile_stride + lane], high = weights[m * tile_stride + 32 + lane];
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n) {
          if (n < column_tiles) {
            MMA(sum[m][n], low.x, high.x, low.y, high.y, states[n].x, states[n].y);
            MMA(sum[m][n], low.z, high.z, low.w, high.w, states[n].z, states[n].w);
          }
        }
      }
    }
  }
};

struct BFloat16Product : Tensor<mma_bfloat16> {
  using Element = uint16_t;
  static __device__ Element narrow(float v) { return BFloat16::store(v); }
  static __device__ Element weight(Element v) { return v; }
};

struct Float16Product : Tensor<mma_float16> {
  using Element = uint16_t;
  static __device__ Element narrow(float v) { return Float16::store(v); }
  static __device__ Element weight(Element v) { return v; }
};

struct Tf32Product : Tensor<mma_tf32> {
  using Element = float;
  static __device__ Element narrow(float v) { return round_tf32(v); }
  static __device__ Element weight(Element v) { return round_tf32(v); }
};

// Float32 in full. The results lie in the lanes as a matrix instruction leaves them; each lane goes through whole rows,
// and so the states pass through a warp's own piece of shared memory, `stage`.
struct Float32Product {
  using Element = float;
  static constexpr int STAGE = COLUMN_TILES * COLUMN_TILE * SEGMENT;
  static __device__ Element narrow(float v) { return v; }
  static __device__ Element weight(Element v) { return v; }

  // Eight rows of one quarter, which the lanes read at once, are adjacent.
  static __device__ int position(int row, int quarter) { return quarter * 16 + row; }

  // Where a row of the batch has its quarter in the stage: apart for the eight lanes that write at once, two rows' four
  // quarters, as for those that read, eight rows of a quarter.
  static __device__ int staged(int row, int quarter) { return quarter * 8 + (row + 2 * quarter) % 8; }

  static __device__ float4 floats(const uint4& v) {
    return {bits_to_float(v.x), bits_to_float(v.y), bits_to_float(v.z), bits_to_float(v.w)};
  }
  static __device__ void add(float& sum, const float4& a, const float4& b) {
    sum = fmaf(a.x, b.x, sum);
    sum = fmaf(a.y, b.y, sum);
    sum = fmaf(a.z, b.z, sum);
    sum = fmaf(a.w, b.w, sum);
  }

  static __device__ void multiply(float (&sum)[ROW_TILES][COLUMN_TILES][4], const uint4* weights, int64_t tile_stride,
                                  int row_tiles, const uint4 (&states)[COLUMN_TILES], int column_tiles, uint4* stage) {
    const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
    __syncwarp();  // the segment before has been read
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n) {
      if (n < column_tiles) stage[n * 32 + staged(row, column)] = states[n];
    }
    __syncwarp();
#pragma unroll 1  // all four at once are only more code
    for (int quarter = 0; quarter < 4; ++quarter) {
      float4 left[COLUMN_TILES], right[COLUMN_TILES];
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; ++n) {
        if (n < column_tiles) {
          left[n] = floats(stage[n * 32 + staged(2 * column, quarter)]);
          right[n] = floats(stage[n * 32 + staged(2 * column + 1, quarter)]);
        }
      }
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        if (m < row_tiles) {
          const float4 low = floats(weights[m * tile_stride + position(row, quarter)]);
          const float4 high = floats(weights[m * tile_stride + position(row + 8, quarter)]);
#pragma unroll
          for (int n = 0; n < COLUMN_TILES; ++n) {
            if (n < column_tiles) {
              add(sum[m][n][0], low, left[n]);
              add(sum[m][n][1], low, right[n]);
              add(sum[m][n][2], high, left[n]);
              add(sum[m][n][3], high, right[n]);
            }
          }
        }
      }
    }
  }
};

// What a kernel has in shared memory beside its lengths.
struct Needs {
  int rows;       // of the weights
  int64_t inner;  // their length
  int element, stage;
  int states;  // float32 of each of the block's units, for each row of the batch
  int biases;
  int table = 0;  // float32 for each row of the batch, in a kernel that normalises
  int met = 0;    // how many pairs of numbers a block leaves of each row in a step, to normalise it
};

constexpr int ROW_STATISTICS = 3;  // pairs of a row, in a kernel that normalises

// Where everything lies in a block's shared memory. launch_plan.py counts the bytes as this does.
struct Layout {
  int row_tiles, columns;  // columns: of a chunk of the batch, at most BATCH
  int segments, row_stride, met;
  int64_t row_bytes;  // of a row of states
  int64_t parts, stage, h, c, bias, lengths, table, statistics, exchange, bytes;

  RECATTN_FN Layout(const GatedPlan& plan, const Needs& needs)
      : row_tiles(int(ceil_div(needs.rows, ROW_TILE))),
        segments(int(ceil_div(needs.inner * needs.element, SEGMENT))), met(needs.met) {
    columns = plan.rows < BATCH ? plan.rows : BATCH;
    row_stride = row_tiles * ROW_TILE + 4;  // four columns of eight rows, as a warp writes them, are in 32 banks
    row_bytes = int64_t(segments | 1) * SEGMENT;  // two rows of a segment, as eight lanes read them, are in 32 banks
    parts = int64_t(row_tiles) * ROW_TILE * segments * SEGMENT;
    stage = parts + int64_t(WARPS) * columns * row_stride * 4;
    h = stage + int64_t(WARPS) * needs.stage;
    c = h + int64_t(plan.rows) * plan.units * 4;
    bias = needs.states > 1 ? c + (c - h) : c;
    lengths = bias + ceil_div(needs.biases, 4) * 16;
    table = lengths + int64_t(plan.rows) * 4;
    statistics = table + int64_t(plan.rows) * needs.table * 4;
    exchange = statistics + (needs.table > 0 ? int64_t(plan.rows) * ROW_STATISTICS * 8 : 0);
    bytes = exchange + (plan.cluster ? group_bytes(plan) : 0);
  }

  // Of the states that the blocks of a group exchange, at two turns.
  RECATTN_FN int64_t group_bytes(const GatedPlan& plan) const { return 2 * plan.rows * row_bytes; }
};

// Some of a product: tiles of the weights' rows, and segments of the inner dimension. Without a segment it is 0.
struct Part {
  int tile, tiles, segment, segments;
};

// 16 bytes, of elements of which element(i) is the i-th.
template <class Element, class F>
__device__ uint4 gather(F element) {
  constexpr int N = 16 / sizeof(Element);
  Element elements[N];
#pragma unroll
  for (int i = 0; i < N; ++i) elements[i] = element(i);
  uint4 v;
  memcpy(&v, elements, 16);
  return v;
}

template <class E>
class Product {
  using Element = typename E::Element;

 public:
  static constexpr int QUARTER = 16 / sizeof(Element);  // elements

  __device__ Product(const Layout& layout, char* memory)
      : layout_(layout), weights_(reinterpret_cast<uint4*>(memory)),
        parts_(reinterpret_cast<float*>(memory + layout.parts)),
        stage_(reinterpret_cast<uint4*>(memory + layout.stage + threadIdx.x / 32 * E::STAGE)) {}

  // quarter(row, k): 16 bytes of a row from its k-th element on, as they lie in memory, 0 past the end. ROWS_FIRST:
  // adjacent rows are adjacent in memory, not adjacent k.
  template <bool ROWS_FIRST, class F>
  __device__ void fill(F quarter) {
    constexpr int LOADS = 4;  // on their way at once, of a thread
    const int rows = layout_.row_tiles * ROW_TILE, quarters = layout_.segments * 4;
    for (int first = threadIdx.x; first < rows * quarters; first += LOADS * BLOCK_THREADS) {
      uint4 loaded[LOADS];
      const auto each = [&](auto f) {
#pragma unroll
        for (int j = 0; j < LOADS; ++j) {
          const int i = first + j * BLOCK_THREADS;
          if (i < rows * quarters) {
            f(loaded[j], ROWS_FIRST ? i % rows : i / quarters, ROWS_FIRST ? i / rows : i % quarters);
          }
        }
      };
      each([&](uint4& v, int row, int q) { v = quarter(row, int64_t(q) * QUARTER); });
      each([&](const uint4& v, int row, int q) {
        Element elements[QUARTER];
        memcpy(elements, &v, 16);
#pragma unroll
        for (int k = 0; k < QUARTER; ++k) elements[k] = E::weight(elements[k]);
        uint4* tile = weights_ + (row / ROW_TILE * layout_.segments + q / 4) * 64;
        memcpy(tile + E::position(row % ROW_TILE, q % 4), elements, 16);
      });
    }
  }

  __device__ Part whole() const { return {0, layout_.row_tiles, 0, layout_.segments}; }
  // The rows from `begin` to `end`, and what else is in their tiles.
  __device__ Part of_rows(int begin, int end) const {
    const int tile = begin / ROW_TILE;
    return {tile, int(ceil_div(end, ROW_TILE)) - tile, 0, layout_.segments};
  }
  // The elements from `begin` to `end` of the inner dimension, and what else is in their segments.
  __device__ Part of_inner(int64_t begin, int64_t end) const {
    constexpr int ELEMENTS = SEGMENT / sizeof(Element);
    const int segment = int(begin / ELEMENTS);
    return {0, layout_.row_tiles, segment, int(ceil_div(end, ELEMENTS)) - segment};
  }

  // Of the rows of states from `states` on, layout.row_bytes apart, in global memory or the block's own. To be followed
  // by a __syncthreads.
  template <bool OWN>
  __device__ void run(const char* states, int column_tiles, const Part& part) {
    for (int tile = 0; tile < part.tiles; tile += ROW_TILES) {
      const int tiles = part.tiles - tile < ROW_TILES ? part.tiles - tile : ROW_TILES;
      run_tiles<OWN>(states, column_tiles, {part.tile + tile, tiles, part.segment, part.segments});
    }
  }

  // Of one of the part's rows.
  __device__ float sum(int row, int column, const Part& part) const {
    const int warps = part.segments < WARPS ? part.segments : WARPS;
    float total = 0.0f;
    for (int warp = 0; warp < warps; ++warp) total += part_of(warp, column)[row];
    return total;
  }

 private:
  // Of as many tiles as a warp has room for.
  template <bool OWN>
  __device__ void run_tiles(const char* states, int column_tiles, const Part& part) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4;
    const char* lane_states = states + row * layout_.row_bytes + column * 16;
    const uint4* weights = weights_ + int64_t(part.tile) * layout_.segments * 64;
    const int end = part.segment + part.segments;
    float sum[ROW_TILES][COLUMN_TILES][4] = {};
    for (int first = part.segment + warp; first < end; first += WARPS * AHEAD) {
      uint4 ahead[AHEAD][COLUMN_TILES];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int segment = first + i * WARPS;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n) {
          if (segment < end && n < column_tiles) {
            const char* from = lane_states + n * COLUMN_TILE * layout_.row_bytes + segment * SEGMENT;
            ahead[i][n] = OWN ? *reinterpret_cast<const uint4*>(from) : load_exchanged(from);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int segment = first + i * WARPS;
        if (segment < end) {
          E::multiply(sum, weights + segment * 64, layout_.segments * 64, part.tiles, ahead[i], column_tiles, stage_);
        }
      }
    }
    if (warp >= part.segments) return;  // and sum() leaves it out
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; ++n) {
        if (m < part.tiles && n < column_tiles) {
          float* at = part_of(warp, n * COLUMN_TILE + 2 * column) + (part.tile + m) * ROW_TILE + row;
          at[0] = sum[m][n][0];
          at[layout_.row_stride] = sum[m][n][1];
          at[8] = sum[m][n][2];
          at[layout_.row_stride + 8] = sum[m][n][3];
        }
      }
    }
  }

  __device__ float* part_of(int warp, int column) const {
    return parts_ + (warp * layout_.columns + column) * layout_.row_stride;
  }

  const Layout layout_;
  uint4* weights_;
  float* parts_;
  uint4* stage_;
};

}  // namespace RECATTN_ISA
}  // namespace recattn
