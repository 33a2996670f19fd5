// Layer normalisation of rows of which a block has its own units alone. Each leaves two numbers of its part of every
// row to the others of its group, and all add up what all have left in one order, and so come to the same bits.
//
// The numbers of a step are left in one place, not in two that take turns: a block leaves those of the next step only
// after a wait for all, who by then have read them and met again.
#pragma once

#include "gated.cuh"

namespace recattn {
namespace RECATTN_ISA {

constexpr float LAYER_NORM_EPS = 1e-5f;

// In all lanes.
__device__ inline float warp_sum(float v) {
  for (int bits = 16; bits > 0; bits /= 2) v += shuffle_xor(v, bits);
  return v;
}

// Of some numbers. squares: the sum of those of their distances from the mean.
struct Moments {
  float count = 0.0f, mean = 0.0f, squares = 0.0f;

  // Chan, Golub and LeVeque, 1979
  __device__ void add(const Moments& other) {
    if (other.count == 0.0f) return;
    if (count == 0.0f) {
      *this = other;
      return;
    }
    const float share = other.count / (count + other.count), distance = other.mean - mean;
    squares += other.squares + distance * distance * count * share;
    mean += distance * share;
    count += other.count;
  }
};

// One table of a row's numbers for each row of the block, `stride` apart: `gates` times the block's units, of which the
// last may be past H. To be called by all threads, after a __syncthreads.
template <class Block>
class Norm {
 public:
  __device__ Norm(const Block& block, int stride)
      : block_(block), units_(block.plan().units), own_(block.units_of(block.slice())), stride_(stride) {}

  // Of each row, for combine_moments().
  __device__ void leave_moments(int which, const float* table, int gates) const {
    each_row([&](int row, int lane) {
      const float* values = table + row * stride_;
      const float count = float(gates * own_);
      const float mean = sum(gates, lane, [&](int i) { return values[i]; }) / count;
      const float squares = sum(gates, lane, [&](int i) { return (values[i] - mean) * (values[i] - mean); });
      if (lane == 0) block_.pairs(which, row)[block_.slice()] = {mean, squares};
    });
  }
  // What a row is normalised by, (v - mean) * rstd, after a wait for all; to be followed by a __syncthreads.
  __device__ void combine_moments(int which, int gates, Pair* mean_rstd) const {
    each_row([&](int row, int lane) {
      Moments all;
      each_pair(which, row, lane, [&](int slice, float mean, float squares) {
        all.add({float(gates * block_.units_of(slice)), mean, squares});
      });
      for (int bits = 16; bits > 0; bits /= 2) {
        all.add({shuffle_xor(all.count, bits), shuffle_xor(all.mean, bits), shuffle_xor(all.squares, bits)});
      }
      if (lane == 0) mean_rstd[row] = {all.mean, 1.0f / sqrtf(all.squares / all.count + LAYER_NORM_EPS)};
    });
  }

  // Of d = grad * weight and of d * normed, for combine_means().
  __device__ void leave_sums(int which, const float* grad, const float* normed, const float* weight, int gates) const {
    each_row([&](int row, int lane) {
      const float *d = grad + row * stride_, *v = normed + row * stride_;
      const float total = sum(gates, lane, [&](int i) { return d[i] * weight[i]; });
      const float along = sum(gates, lane, [&](int i) { return d[i] * weight[i] * v[i]; });
      if (lane == 0) block_.pairs(which, row)[block_.slice()] = {total, along};
    });
  }
  // Their means over the row's `count` numbers, as combine_moments().
  __device__ void combine_means(int which, float count, Pair* means) const {
    each_row([&](int row, int lane) {
      Pair all{};
      each_pair(which, row, lane, [&](int, float total, float along) {
        all.first += total;
        all.second += along;
      });
      all = {warp_sum(all.first), warp_sum(all.second)};
      if (lane == 0) means[row] = {all.first / count, all.second / count};
    });
  }

  // To what the thread's column has added up to, over rows and steps: dL/dweight and dL/dbias.
  __device__ void add_columns(const float* grad, const float* normed, int gates, Sum& weight, Sum& bias) const {
    if (int(threadIdx.x) >= gates * units_) return;
    float of_weight = 0.0f, of_bias = 0.0f;
    for (int row = 0; row < block_.rows(); ++row) {
      const int i = row * stride_ + int(threadIdx.x);
      of_weight += grad[i] * normed[i];
      of_bias += grad[i];
    }
    weight.add(of_weight);
    bias.add(of_bias);
  }

 private:
  template <class F>
  __device__ void each_row(F f) const {
    for (int row = threadIdx.x / 32; row < block_.rows(); row += WARPS) f(row, int(threadIdx.x % 32));
  }
  template <class F>
  __device__ float sum(int gates, int lane, F f) const {
    float v = 0.0f;
    for (int i = lane; i < gates * units_; i += 32) {
      if (i % units_ < own_) v += f(i);
    }
    return warp_sum(v);
  }
  // f(slice, first, second) for those slices that are the lane's.
  template <class F>
  __device__ void each_pair(int which, int row, int lane, F f) const {
    for (int slice = 2 * lane; slice < block_.plan().slices; slice += 64) {
      const uint4 v = load_exchanged(block_.pairs(which, row) + slice);
      f(slice, bits_to_float(v.x), bits_to_float(v.y));
      if (slice + 1 < block_.plan().slices) f(slice + 1, bits_to_float(v.z), bits_to_float(v.w));
    }
  }

  const Block& block_;
  const int units_, own_, stride_;
};

}  // namespace RECATTN_ISA
}  // namespace recattn
