// A glimpse's two passes: rows of the image blended down to one row a cell, and those reduced across to one value each.
#pragma once

#include "glimpse_axis.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

template <class R, class S>
RECATTN_FN R as(S v) {
  if constexpr (sizeof(S) == 2) {
    return load(v);
  } else {
    return R(v);
  }
}

// LANES<R> elements of any type.
template <class R, class S>
RECATTN_FN Vec<R> load_lanes(const S* from) {
  Vec<R> v;
  if constexpr (sizeof(S) == sizeof(R)) {
    v = load_vector(from);
#if defined(__AVX512F__)
  } else if constexpr (sizeof(S) == 1 && sizeof(R) == 4) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    v = (Vec<R>)_mm512_maskz_cvtepi32_ps(ALL, _mm512_maskz_cvtepu8_epi32(ALL, bytes));
#elif defined(__AVX2__)
  } else if constexpr (sizeof(S) == 1 && sizeof(R) == 4) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    v = (Vec<R>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
#endif
  } else {
    R lanes[LANES<R>];
    if constexpr (sizeof(S) == 2) {
      widen(lanes, from, LANES<R>);
    } else {
      for (int i = 0; i < LANES<R>; ++i) lanes[i] = R(from[i]);
    }
    v = load_vector(lanes);
  }
  return v;
}

// to[x] = sum over t of weights[t] * from[t * row + x], x in steps of V vectors as far as they fit; where it stopped.
template <int V, class S, class R>
int64_t blend_vectors(const S* from, int64_t row, const R* weights, int64_t count, R* to, int64_t x, int64_t n) {
  for (; x + V * LANES<R> <= n; x += V * LANES<R>) {
    Vec<R> sums[V] = {};
    const S* at = from + x;
    for (int64_t t = 0; t < count; ++t, at += row) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[v] += load_lanes<R>(at + v * LANES<R>) * weights[t];
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store_vector(to + x + v * LANES<R>, sums[v]);
  }
  return x;
}

// The same for n elements that lie `step` apart.
template <class S, class R>
void blend(const S* from, int64_t row, int64_t step, const R* weights, int64_t count, R* to, int64_t n) {
  int64_t x = 0;
  if (step == 1) {
    x = blend_vectors<4>(from, row, weights, count, to, x, n);
    x = blend_vectors<2>(from, row, weights, count, to, x, n);
    x = blend_vectors<1>(from, row, weights, count, to, x, n);
  }
  for (; x < n; ++x) {
    R sum = 0;
    for (int64_t t = 0; t < count; ++t) sum += as<R>(from[t * row + x * step]) * weights[t];
    to[x] = sum;
  }
}

// The rows of an image as the passes read them. Channels that lie beside each other in memory are read together.
template <class S>
struct Plane {
  const S* data;
  int64_t row, step, width;  // of one row: elements from one to the next, and how many
  int64_t together, apart;   // channels in a row, and from one row's channels to the next's
  int64_t groups;            // so many rows have all the channels

  Plane(const Glimpse& p, int64_t b) : data(static_cast<const S*>(p.image) + b * p.image_b), row(p.image_y) {
    const bool interleaved = p.C > 1 && p.image_c == 1 && p.image_x == p.C;
    together = interleaved ? p.C : 1;
    groups = p.C / together;
    step = interleaved ? 1 : p.image_x;
    width = p.W * together;
    apart = interleaved ? 0 : p.image_c;
  }
};

// LANES<R> cell rows at a time, blended and turned: [element of the row][cell row].
template <class S, class R>
class Rows {
 public:
  static constexpr int L = LANES<R>;
  int64_t first = 0;  // element of the image's row that is [0]

  // The row's part that cells of `across` see, widened to whole vectors where the row has them.
  void span(const Plane<S>& plane, const Axis<R>& across) {
    const int64_t wanted = ceil_div((across.high - across.low) * plane.together, L) * L;
    first = across.low * plane.together;
    if (first + wanted > plane.width) first = wanted < plane.width ? plane.width - wanted : 0;
    n_ = least(wanted, plane.width - first);
    pitch_ = ceil_div(n_, L) * L;
    blended_ = blended_buffer_.at_least(L * pitch_);
    turned_ = turned_buffer_.at_least(pitch_ * L);
  }

  // Cell row i of `lanes` is the blend of count rows of the image from `start` on.
  void blend_row(const Plane<S>& plane, int64_t group, int lane, int64_t start, int64_t count, const R* weights) {
    const S* from = plane.data + group * plane.apart + start * plane.row + first * plane.step;
    blend(from, plane.row, plane.step, weights, count, blended_ + lane * pitch_, n_);
  }

  void turn(int lanes) {
    const R* rows[L];
    for (int i = 0; i < L; ++i) rows[i] = blended_ + (i < lanes ? i : 0) * pitch_;
    transpose(rows, n_, turned_, L);
  }

  const R* at(int64_t element) const { return turned_ + (element - first) * L; }

  // The cell's value in every cell row; c: which of the channels that lie together.
  Vec<R> reduce(const Cell<R>& cell, int64_t together, int64_t c) const {
    Vec<R> sums[2] = {};
    const R* from = turned_ + (cell.start * together + c - first) * L;
    const int64_t step = together * L;
    int64_t t = 0;
    for (; t + 2 <= cell.count; t += 2, from += 2 * step) {
      sums[0] += load_vector(from) * cell.weights[t];
      sums[1] += load_vector(from + step) * cell.weights[t + 1];
    }
    if (t < cell.count) {
      sums[0] += load_vector(from) * cell.weights[t];
    }
    return sums[0] + sums[1];
  }

 private:
  Buffer<R> blended_buffer_, turned_buffer_;
  R* blended_ = nullptr;
  R* turned_ = nullptr;
  int64_t n_ = 0, pitch_ = 0;
};

// Calls f<S, R>() for the image's type.
template <class F>
void by_pixel(const Glimpse& p, F f) {
  switch (p.pixel) {
    case Pixel::float32: return f.template operator()<float, float>();
    case Pixel::float64: return f.template operator()<double, double>();
    case Pixel::bfloat16: return f.template operator()<BFloat16, float>();
    case Pixel::float16: return f.template operator()<Float16, float>();
    case Pixel::uint8:
      return p.wide ? f.template operator()<uint8_t, double>() : f.template operator()<uint8_t, float>();
  }
}

// n values to or from row `at` elements into a tensor of cells.
template <class R>
void write_cells(const Glimpse& p, void* to, int64_t at, const R* from, int64_t n) {
  switch (p.dtype) {
    case Dtype::float32:
      for (int64_t i = 0; i < n; ++i) static_cast<float*>(to)[at + i] = float(from[i]);
      return;
    case Dtype::float64:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(to)[at + i] = double(from[i]);
      return;
    case Dtype::bfloat16:
      for (int64_t i = 0; i < n; ++i) store(static_cast<BFloat16*>(to) + at + i, float(from[i]));
      return;
    case Dtype::float16:
      for (int64_t i = 0; i < n; ++i) store(static_cast<Float16*>(to) + at + i, float(from[i]));
      return;
  }
}

template <class R>
void read_cells(const Glimpse& p, const void* from, int64_t at, R* to, int64_t n) {
  switch (p.dtype) {
    case Dtype::float32:
      for (int64_t i = 0; i < n; ++i) to[i] = R(static_cast<const float*>(from)[at + i]);
      return;
    case Dtype::float64:
      for (int64_t i = 0; i < n; ++i) to[i] = R(static_cast<const double*>(from)[at + i]);
      return;
    case Dtype::bfloat16:
      for (int64_t i = 0; i < n; ++i) to[i] = R(load(static_cast<const BFloat16*>(from)[at + i]));
      return;
    case Dtype::float16:
      for (int64_t i = 0; i < n; ++i) to[i] = R(load(static_cast<const Float16*>(from)[at + i]));
      return;
  }
}

inline int threads_for(const Glimpse& p) {
  // A thread's start costs some microseconds.
  double taps = 0, k = p.base;
  for (int64_t s = 0; s < p.S; ++s, k *= p.factor) taps += (k + 2) * (k + 2);
  return double(p.B * p.G * p.C * p.height * p.width) * taps < 100000 ? 1 : p.threads;
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
