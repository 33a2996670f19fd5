// Layer normalisation without scale and shift, row by row:
//
//   y = (x - mean(x)) * rstd,  rstd = 1 / sqrt(mean((x - mean(x))^2) + eps)
//   dx = (dy - mean(dy) - y * mean(dy * y)) * rstd
#include "normalise.h"

#include "numeric.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr int64_t LANES = 32;  // sums kept apart, so that they are vectors and short

// sum over i < n of term(i), in one order whatever the threads. One sum a pass: compilers keep the lanes of two in memory.
template <class F>
RECATTN_FN float sum_of(int64_t n, F term) {
  float lanes[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int64_t l = 0; l < LANES; ++l) lanes[l] += term(i + l);
  for (int64_t l = 0; i + l < n; ++l) lanes[l] += term(i + l);
  for (int64_t half = LANES / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

RECATTN_FN float forward(const float* __restrict x, float* __restrict y, int64_t n, float eps) {
  const float rough = sum_of(n, [=](int64_t i) { return x[i]; }) / n;
  // What the rounded mean is off by: without it a large mean would take the digits of a small variance.
  const float mean = rough + sum_of(n, [=](int64_t i) { return x[i] - rough; }) / n;
  const float variance = sum_of(n, [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); }) / n;
  const float rstd = 1 / __builtin_sqrtf(variance + eps);
  for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * rstd;
  return rstd;
}

RECATTN_FN void backward(const float* __restrict y, const float* __restrict dy, float* __restrict dx, int64_t n,
                         float rstd) {
  const float mean = sum_of(n, [=](int64_t i) { return dy[i]; }) / n;
  const float along = sum_of(n, [=](int64_t i) { return dy[i] * y[i]; }) / n;
  for (int64_t i = 0; i < n; ++i) dx[i] = (dy[i] - mean - y[i] * along) * rstd;
}

}  // namespace

void normalise(const Normalise& p) {
#pragma omp parallel for schedule(static) num_threads(p.rows * p.width < 32768 ? 1 : p.threads)
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t at = r * p.width;
    if (p.dy) {
      backward(p.y + at, p.dy + at, p.dx + at, p.width, p.rstd[r]);
    } else {
      p.rstd[r] = forward(p.x + at, p.y + at, p.width, p.eps);
    }
  }
}

}  // namespace RECATTN_ISA
}  // namespace recattn
