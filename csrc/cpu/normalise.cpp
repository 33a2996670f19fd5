// Layer normalisation without scale and shift, row by row:
//
//   y = (x - mean(x)) * rstd,  rstd = 1 / sqrt(mean((x - mean(x))^2) + eps)
//   dx = (dy - mean(dy) - y * mean(dy * y)) * rstd
//
// A sum along a row waits for the one before it, and a row of some tens of features for little else: as many rows are
// taken at once as a vector has lanes, so that their sums are one vector.
#include "normalise.h"

#include "tile.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr int L = LANES<float>;
constexpr int64_t AT_ONCE = 8192;  // elements of x, which stay in the first-level cache from one pass to the next

// Rows of n elements, `count` of them, of which there may be fewer than L.
struct Group {
  int64_t n, count;

  // The mean of each row's n terms. term(r, at): those of row r at some of its elements; what it is past the row's end
  // does not matter, as long as it is finite.
  template <class F>
  RECATTN_FN Vec<float> means(F term) const {
    Vec<float> sums[L] = {}, exists = {};
    const int64_t whole = n / L * L;
    for (int64_t i = whole; i < n; ++i) exists[i - whole] = 1;
    for (int64_t r = 0; r < count; ++r) {
      Vec<float> even = {}, odd = {};
      int64_t i = 0;
      for (; i + 2 * L <= n; i += 2 * L) {
        even += term(r, Lanes<float>{i, i + L});
        odd += term(r, Lanes<float>{i + L, i + 2 * L});
      }
      if (i + L <= n) even += term(r, Lanes<float>{i, i + L});
      if (whole < n) odd += exists * term(r, Lanes<float>{whole, n});
      sums[r] = even + odd;
    }
    // Each round adds halves of two rows' sums, and leaves the rows in neighbouring lanes.
#pragma GCC unroll 4
    for (int rows = L / 2; rows > 0; rows /= 2) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        Vec<float> low, high;
        interleave(sums[r], sums[r + rows], low, high);
        sums[r] = low + high;
      }
    }
    return sums[0] / float(n);
  }

  // f(r, at) for all elements of all rows.
  template <class F>
  RECATTN_FN void each(F f) const {
    for (int64_t r = 0; r < count; ++r) {
      int64_t i = 0;
      for (; i + L <= n; i += L) f(r, Lanes<float>{i, i + L});
      if (i < n) f(r, Lanes<float>{i, n});
    }
  }
};

RECATTN_FN void forward(const Group& group, const float* x, float* y, float* rstd, float eps) {
  const int64_t n = group.n;
  const auto load = [=](int64_t r, const Lanes<float>& at) { return at.load(x + r * n); };
  const Vec<float> rough = group.means(load);
  // What the rounded mean is off by: without it a large mean would take the digits of a small variance.
  const Vec<float> mean = rough + group.means([&](int64_t r, auto at) { return load(r, at) - rough[r]; });
  Vec<float> scale = group.means([&](int64_t r, auto at) {
    const Vec<float> centred = load(r, at) - mean[r];
    return centred * centred;
  });
  for (int r = 0; r < L; ++r) scale[r] = 1 / __builtin_sqrtf(scale[r] + eps);
  group.each([&](int64_t r, auto at) { at.store(y + r * n, (load(r, at) - mean[r]) * scale[r]); });
  for (int64_t r = 0; r < group.count; ++r) rstd[r] = scale[r];
}

RECATTN_FN void backward(const Group& group, const float* y, const float* dy, float* dx, const float* rstd) {
  const int64_t n = group.n;
  const auto load = [=](const float* from, int64_t r, const Lanes<float>& at) { return at.load(from + r * n); };
  const Vec<float> mean = group.means([&](int64_t r, auto at) { return load(dy, r, at); });
  const Vec<float> along = group.means([&](int64_t r, auto at) { return load(dy, r, at) * load(y, r, at); });
  group.each([&](int64_t r, auto at) {
    at.store(dx + r * n, (load(dy, r, at) - mean[r] - load(y, r, at) * along[r]) * rstd[r]);
  });
}

}  // namespace

void normalise(const Normalise& p) {
  if (p.width == 0) return;
  const int64_t together = AT_ONCE / p.width > 1 ? least(L, AT_ONCE / p.width) : 1;
#pragma omp parallel for schedule(static) num_threads(p.rows * p.width < 32768 ? 1 : p.threads)
  for (int64_t r = 0; r < p.rows; r += together) {
    const Group group = {p.width, least(together, p.rows - r)};
    const int64_t at = r * p.width;
    if (p.dy) {
      backward(group, p.y + at, p.dy + at, p.dx + at, p.rstd + r);
    } else {
      forward(group, p.x + at, p.y + at, p.rstd + r, p.eps);
    }
  }
}

}  // namespace RECATTN_ISA
}  // namespace recattn
