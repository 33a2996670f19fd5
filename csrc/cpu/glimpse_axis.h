// Which pixels each cell of a glimpse sees along one axis, with what weights, and how those change with the centre and
// the cell's size. The arithmetic is that of the reference, operation by operation: positions decide on whole pixels.
#pragma once

#include <cstdlib>

#include "glimpse.h"
#include "tile.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr double FAR = 1073741824.0;  // centres further out are moved here

// a * b, rounded: a fused multiply-add may carry a position over the edge of a pixel.
inline double rounded_product(double a, double b) {
  volatile double product = a * b;
  return product;
}

// NaN is low: whatever a position is, nothing is read elsewhere.
inline int64_t clamped(double v, int64_t low, int64_t high) {
  return !(v > double(low)) ? low : v > double(high) ? high : int64_t(v);
}

inline double down(double v) { return __builtin_floor(v); }
inline double within_reach(double centre) { return centre < -FAR ? -FAR : centre > FAR ? FAR : centre; }

// Memory of one thread, aligned for any vector; grows as it is asked for more and keeps nothing.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }
  T* at_least(int64_t n) {
    if (n > size_) {
      free(data_);
      const int64_t bytes = (n * int64_t(sizeof(T)) + 63) / 64 * 64;
      data_ = static_cast<T*>(aligned_alloc(64, bytes));
      if (!data_) abort();
      size_ = n;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// A remainder of v by m in [0, m).
inline double modulo(double v, double m) {
  const double r = __builtin_fmod(v, m);
  return r < 0 ? r + m : r;
}

// Where a cell's taps begin and how many there are. lower and upper, -1 if there is none, are the pixels by which its
// value changes with the centre, by slope * (I[upper] - I[lower]), and with the cells' size, by m times that, and,
// where cells have a size, slope * (I[upper] - value) besides.
template <class R>
struct Cell {
  int64_t start, count;
  int64_t lower, upper;
  const R* weights;
  R m;
};

template <class R>
class Axis {
 public:
  int64_t low = 0, high = 0;  // all taps lie in [low, high)
  R slope = 0;
  bool shrinks = false;

  const Cell<R>& operator[](int64_t j) const { return cells_[j]; }

  // Cells begin to end of n, on an axis of N pixels. wanted: lower and upper too lie in [low, high).
  void smooth(const Glimpse& p, double centre, double k, int64_t n, int64_t N, int64_t begin, int64_t end,
              bool wanted) {
    N_ = N, padding_ = p.padding;
    const bool area = p.mode == GlimpseMode::area;
    reserve(end, area ? int64_t(k < double(N) ? k : double(N)) + 2 : 2);
    centre = padding_ == Padding::reflect ? modulo(centre, 2.0 * double(N)) : within_reach(centre);
    const double half = double(n) / 2;
    slope = area ? R(1 / k) : R(1);
    shrinks = area;
    if (area && padding_ == Padding::zeros) return boxes(centre, k, half, begin, end, wanted);
    double a = centre + rounded_product(double(begin) - half, k);
    for (int64_t j = begin; j < end; ++j) {
      Cell<R>& cell = cells_[j];
      if (area) {
        const double b = centre + rounded_product(double(j + 1) - half, k);
        box(cell, a, b, k, taps_ + j * stride_);
        cell.m = R(double(j) - half);
        a = b;
      } else {
        const double m = double(j) + 0.5 - half;
        point(cell, centre + rounded_product(m, k) - 0.5, taps_ + j * stride_);
        cell.m = R(m);
      }
    }
    bound(begin, end, wanted);
  }

  // Cells of q whole pixels each, from pixel `first`.
  void whole(int64_t first, int64_t q, int64_t n, int64_t N) {
    reserve(n, q);
    for (int64_t j = 0; j < n; ++j) {
      Cell<R>& cell = cells_[j];
      const int64_t from = first + j * q, to = from + q;
      cell.start = from < 0 ? 0 : from;
      cell.count = (to > N ? N : to) - cell.start;
      if (cell.count < 0) cell.count = 0;
      for (int64_t t = 0; t < cell.count; ++t) taps_[j * stride_ + t] = R(1) / R(q);
      cell.weights = taps_ + j * stride_;
      cell.lower = cell.upper = -1;
    }
    bound(0, n, false);
  }

 private:
  Buffer<Cell<R>> cell_buffer_;
  Buffer<R> tap_buffer_, share_buffer_;
  Buffer<double> edge_buffer_, pixel_buffer_;
  Buffer<int64_t> place_buffer_;
  Cell<R>* cells_ = nullptr;
  R* taps_ = nullptr;
  int64_t stride_ = 0, N_ = 0;
  Padding padding_ = Padding::zeros;

  void reserve(int64_t n, int64_t stride) {
    stride_ = ceil_div(stride, LANES<R>) * LANES<R>;
    cells_ = cell_buffer_.at_least(n);
    taps_ = tap_buffer_.at_least(n * stride_);
  }

  // The pixel that is seen at v, a whole number that may lie outside.
  int64_t shown(double v) const {
    if (padding_ == Padding::border) return clamped(v, 0, N_ - 1);
    if (padding_ == Padding::reflect) {
      const int64_t u = clamped(modulo(v, 2.0 * double(N_)), 0, 2 * N_ - 1);
      return u < N_ ? u : 2 * N_ - 1 - u;
    }
    return v >= 0 && v < double(N_) ? int64_t(v) : -1;
  }

  // How much of what shows pixel p lies before the edge.
  double before(double edge, double p) const {
    const double N = double(N_);
    if (padding_ == Padding::reflect) {
      const double turns = down(edge / (2 * N));
      const double rest = edge - rounded_product(turns, 2 * N);
      return 2 * turns + part(rest, p) + part(rest, 2 * N - 1 - p);
    }
    double r = part(edge, p);
    if (padding_ == Padding::border) {
      if (p == 0 && edge < 0) r += edge;
      if (p == N - 1 && edge >= N) r += edge - N;
    }
    return r;
  }
  static double part(double edge, double p) {
    const double pixel = down(edge);
    return pixel > p ? 1.0 : pixel == p ? edge - pixel : 0.0;
  }

  void box(Cell<R>& cell, double a, double b, double k, R* weights) const {
    const double first = down(a), after = down(b);
    cell.lower = shown(first);
    cell.upper = shown(after);
    cell.weights = weights;
    if (first == after) {  // one pixel has the whole cell
      cell.start = cell.lower < 0 ? 0 : cell.lower;
      cell.count = cell.lower < 0 ? 0 : 1;
      weights[0] = R(1);
      return;
    }
    const double last = b > after ? after : after - 1;
    int64_t from, to;  // the last one included
    if (padding_ == Padding::border) {
      from = clamped(first, 0, N_ - 1), to = clamped(last, 0, N_ - 1);
    } else {
      reflected(first, last, from, to);
    }
    for (int64_t i = from; i <= to; ++i) weights[i - from] = R((before(b, double(i)) - before(a, double(i))) / k);
    cell.start = from;
    cell.count = to - from + 1;
  }

  // The boxes of an image with nothing around it, the usual ones: edge by edge, so that loops vectorise.
  void boxes(double centre, double k, double half, int64_t begin, int64_t end, bool wanted) {
    const int64_t edges = end - begin + 1;
    double* const __restrict steps = edge_buffer_.at_least(edges);
    double* const __restrict pixels = pixel_buffer_.at_least(edges);
    R* const __restrict shares = share_buffer_.at_least(2 * edges);
    int64_t* const __restrict places = place_buffer_.at_least(edges);
    multiples(steps, double(begin) - half, k, edges);
    const double most = double(N_), per_k = 1 / k;
    RECATTN_INDEPENDENT
    for (int64_t i = 0; i < edges; ++i) {
      const double edge = centre + steps[i], pixel = down(edge), f = edge - pixel;
      pixels[i] = pixel;
      // Rounded to float the product is as good as the quotient.
      shares[i] = R(sizeof(R) == 4 ? f * per_k : f / k);
      shares[edges + i] = R(sizeof(R) == 4 ? (1 - f) * per_k : (1 - f) / k);
      const double above = pixel > -1 ? pixel : -1;
      places[i] = int64_t(above < most ? above : most);
    }
    const R inner = R(per_k);
    low = INT64_MAX, high = 0;
    for (int64_t i = 0; i + 1 < edges; ++i) {
      const int64_t a = places[i], b = places[i + 1];
      Cell<R>& cell = cells_[begin + i];
      R* const weights = taps_ + (begin + i) * stride_;
      const bool within = pixels[i] == pixels[i + 1];
      const int64_t last = within || shares[i + 1] > 0 ? b : b - 1;
      const int64_t from = a < 0 ? 0 : a, to = last < N_ ? last : N_ - 1;
      cell.start = from;
      cell.count = to < from ? 0 : to - from + 1;
      cell.lower = a < N_ ? a : -1;
      cell.upper = b < N_ ? b : -1;
      cell.weights = weights;
      cell.m = R(double(begin + i) - half);
      for (int64_t t = 0; t < cell.count; t += LANES<R>) {
        const Vec<R> all = Vec<R>{} + inner;
        store_vector(weights + t, all);
      }
      if (a >= 0) weights[0] = within ? R(1) : shares[edges + i];
      if (b == to && !within && cell.count > 0) weights[to - from] = shares[i + 1];
      if (cell.count > 0) include(from, to + 1);
      if (wanted && cell.lower >= 0) include(cell.lower, cell.lower + 1);
      if (wanted && cell.upper >= 0) include(cell.upper, cell.upper + 1);
    }
    if (high == 0) low = 0;
  }
  // Apart from what they are added to, so that no compiler fuses the two.
  __attribute__((noinline)) static void multiples(double* to, double first, double k, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = (first + double(i)) * k;
  }

  // What is seen between two whole numbers: the image's ends if a turn lies between them.
  void reflected(double first, double last, int64_t& from, int64_t& to) const {
    from = 0, to = N_ - 1;
    if (!(last - first < 2.0 * double(N_) - 1)) return;
    const int64_t s = clamped(modulo(first, 2.0 * double(N_)), 0, 2 * N_ - 1), t = s + int64_t(last - first);
    const int64_t one = shown(first), other = shown(last);
    if (s > 0 && t < 2 * N_ - 1) from = one < other ? one : other;
    if (!(s <= N_ && t >= N_ - 1) && t < 3 * N_ - 1) to = one < other ? other : one;
  }

  void point(Cell<R>& cell, double at, R* weights) const {
    const double first = down(at), t = at - first;
    cell.lower = shown(first);
    cell.upper = shown(first + 1);
    cell.weights = weights;
    const bool has[2] = {cell.lower >= 0, cell.upper >= 0 && t != 0};
    cell.count = has[0] + has[1];
    if (cell.count == 2 && cell.lower == cell.upper) {
      cell.start = cell.lower;
      cell.count = 1;
      weights[0] = R((1 - t) + t);
    } else if (cell.count == 2) {
      const bool up = cell.lower < cell.upper;
      cell.start = up ? cell.lower : cell.upper;
      weights[0] = R(up ? 1 - t : t);
      weights[1] = R(up ? t : 1 - t);
    } else {
      cell.start = has[0] ? cell.lower : has[1] ? cell.upper : 0;
      weights[0] = R(has[0] ? 1 - t : t);
    }
  }

  void bound(int64_t begin, int64_t end, bool wanted) {
    low = INT64_MAX, high = 0;
    for (int64_t j = begin; j < end; ++j) {
      const Cell<R>& cell = cells_[j];
      if (cell.count > 0) include(cell.start, cell.start + cell.count);
      if (wanted && cell.lower >= 0) include(cell.lower, cell.lower + 1);
      if (wanted && cell.upper >= 0) include(cell.upper, cell.upper + 1);
    }
    if (high == 0) low = 0;
  }
  void include(int64_t from, int64_t to) {
    low = from < low ? from : low;
    high = to > high ? to : high;
  }
};

// One scale of one glimpse: where it is, in R's arithmetic.
template <class R>
struct Place {
  R x, y;
  double k;
  bool valid;

  Place(const Glimpse& p, int64_t b, int64_t g, int64_t s) {
    const R* loc = static_cast<const R*>(p.loc) + b * p.loc_b + g * p.loc_g;
    x = loc[0], y = loc[p.loc_xy];
    valid = __builtin_isfinite(x) && __builtin_isfinite(y);
    k = p.base;
    for (int64_t i = 0; i < s; ++i) k = rounded_product(k, p.factor);
    if (p.zoom) {
      const R zoom = static_cast<const R*>(p.zoom)[b * p.zoom_b + g * p.zoom_g];
      valid = valid && __builtin_isfinite(zoom) && zoom > 0;
      k = double(zoom) * k;
    }
    valid = valid && __builtin_isfinite(k);
  }
  double centre_x(const Glimpse& p) const { return rounded_product((double(x) + 1) / 2, double(p.W)); }
  double centre_y(const Glimpse& p) const { return rounded_product((double(y) + 1) / 2, double(p.H)); }
};

// The compatible modes' windows of scale s, of n cells on an axis of N pixels.
inline int64_t window_of(int64_t n, double factor, int64_t s) {
  for (; s > 0; --s) n = int64_t(factor * double(n));
  return n;
}

// The window's first pixel. seen: the size that the mode takes for this axis.
template <class R>
int64_t window_start(GlimpseMode mode, R loc, int64_t seen, int64_t N, int64_t n, int64_t window) {
  R start;
  if (mode == GlimpseMode::kevinzakka) {
    start = R(down(R(0.5) * ((loc + 1) * R(seen)))) - R(window / 2);
  } else if (mode == GlimpseMode::tf) {
    // A half is exact, so that a fused multiply-add rounds as the two operations do.
    start = R(__builtin_trunc(loc * R(N) / 2 + R(N) / 2 - R(n) / 2));
  } else {
    const int64_t half = (window - 1) / 2;
    const R room = R(N + 2 * half - window);
    R at = (loc + 1) / 2 * room;
    at = at < 0 ? R(0) : at;
    at = at > room ? room : at;
    start = R(down(at)) - R(half);
  }
  return start < R(-window) ? -window : start > R(N) ? N : int64_t(start);
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
