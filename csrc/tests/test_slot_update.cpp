// csrc/cpu/slot_update.cpp, and with it normalise.cpp, against their formulas in double precision.
//
// Every tensor is an allocation of its exact size, so that AddressSanitizer sees an access one element past it, and
// what is to be written is NaN before.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "../cpu/slot_update.h"
#include "check.h"

namespace recattn {
namespace {

struct Sizes {
  int64_t R, D, M;
};

constexpr double EPS = 1e-5;
enum { updates, slots, weight_ih, weight_hh, bias_ih, bias_hh, norm, norm_bias, up, up_bias, down, down_bias, INPUTS };
const char* const NAMES[] = {"updates",   "slots",     "weight_ih", "weight_hh", "bias_ih", "bias_hh",
                             "norm",      "norm_bias", "up",        "up_bias",   "down",    "down_bias"};

int64_t size(int input, const Sizes& s) {
  const int64_t sizes[] = {s.R * s.D, s.R * s.D, 3 * s.D * s.D, 3 * s.D * s.D, 3 * s.D, 3 * s.D,
                           s.D,       s.D,       s.M * s.D,     s.M,           s.D * s.M, s.D};
  return sizes[input];
}

using Numbers = std::vector<double>;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// The result, and into `grads` what `grad` (R, D) makes of it: one slot after another, one sum after another.
Numbers define(const Sizes& s, const Numbers* in, const Numbers& grad, Numbers* grads) {
  const int64_t D = s.D, M = s.M;
  Numbers result(s.R * D);
  for (int i = 0; i < INPUTS; ++i) grads[i].assign(size(i, s), 0);
  for (int64_t r = 0; r < s.R; ++r) {
    const double *u = in[updates].data() + r * D, *h0 = in[slots].data() + r * D, *dout = grad.data() + r * D;
    Numbers x(in[bias_ih]), q(in[bias_hh]), h(D), y(D), z(D), hidden(in[up_bias]), out(in[down_bias]);
    for (int64_t i = 0; i < 3 * D; ++i) {
      for (int64_t d = 0; d < D; ++d) {
        x[i] += in[weight_ih][i * D + d] * u[d];
        q[i] += in[weight_hh][i * D + d] * h0[d];
      }
    }
    double mean = 0, variance = 0;
    for (int64_t d = 0; d < D; ++d) {
      const double update = sigmoid(x[D + d] + q[D + d]);
      h[d] = (1 - update) * std::tanh(x[2 * D + d] + sigmoid(x[d] + q[d]) * q[2 * D + d]) + update * h0[d];
      mean += h[d] / double(D);
    }
    for (int64_t d = 0; d < D; ++d) variance += (h[d] - mean) * (h[d] - mean) / double(D);
    const double rstd = 1 / std::sqrt(variance + EPS);
    for (int64_t d = 0; d < D; ++d) {
      y[d] = (h[d] - mean) * rstd;
      z[d] = y[d] * in[norm][d] + in[norm_bias][d];
    }
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t d = 0; d < D; ++d) hidden[m] += in[up][m * D + d] * z[d];
      hidden[m] = hidden[m] > 0 ? hidden[m] : 0;
    }
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t m = 0; m < M; ++m) out[d] += in[down][d * M + m] * hidden[m];
      result[r * D + d] = h[d] + out[d];
    }

    Numbers dhidden(M), dz(D), dh(dout, dout + D), dx(3 * D), dq(3 * D);
    for (int64_t d = 0; d < D; ++d) {
      grads[down_bias][d] += dout[d];
      for (int64_t m = 0; m < M; ++m) {
        grads[down][d * M + m] += dout[d] * hidden[m];
        if (hidden[m] > 0) dhidden[m] += dout[d] * in[down][d * M + m];
      }
    }
    for (int64_t m = 0; m < M; ++m) {
      grads[up_bias][m] += dhidden[m];
      for (int64_t d = 0; d < D; ++d) {
        grads[up][m * D + d] += dhidden[m] * z[d];
        dz[d] += dhidden[m] * in[up][m * D + d];
      }
    }
    double dmean = 0, along = 0;
    for (int64_t d = 0; d < D; ++d) {
      grads[norm][d] += dz[d] * y[d];
      grads[norm_bias][d] += dz[d];
      dmean += dz[d] * in[norm][d] / double(D);
      along += dz[d] * in[norm][d] * y[d] / double(D);
    }
    for (int64_t d = 0; d < D; ++d) {
      dh[d] += (dz[d] * in[norm][d] - dmean - y[d] * along) * rstd;
      const double reset = sigmoid(x[d] + q[d]), update = sigmoid(x[D + d] + q[D + d]);
      const double n = std::tanh(x[2 * D + d] + reset * q[2 * D + d]), dn = dh[d] * (1 - update) * (1 - n * n);
      dx[d] = dq[d] = dn * q[2 * D + d] * reset * (1 - reset);
      dx[D + d] = dq[D + d] = dh[d] * (h0[d] - n) * update * (1 - update);
      dx[2 * D + d] = dn, dq[2 * D + d] = dn * reset;
      grads[slots][r * D + d] += dh[d] * update;
    }
    for (int64_t i = 0; i < 3 * D; ++i) {
      grads[bias_ih][i] += dx[i], grads[bias_hh][i] += dq[i];
      for (int64_t d = 0; d < D; ++d) {
        grads[weight_ih][i * D + d] += dx[i] * u[d], grads[weight_hh][i * D + d] += dq[i] * h0[d];
        grads[updates][r * D + d] += dx[i] * in[weight_ih][i * D + d];
        grads[slots][r * D + d] += dq[i] * in[weight_hh][i * D + d];
      }
    }
  }
  return result;
}

// Each element as precise as the sums behind it, which go over as many as `terms`.
void compare(const char* what, const std::string& where, const std::vector<float>& found, const Numbers& expected,
             int64_t terms) {
  double largest = 0, error = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    largest = std::max(largest, std::fabs(expected[i]));
    error = std::max(error, std::isnan(found[i]) ? INFINITY : std::fabs(double(found[i]) - expected[i]));
  }
  const double bound = 6e-8 * (8 + 2 * std::sqrt(double(terms))) * (largest + 1);
  CHECK(error <= bound, "%s: %s is off by %g, more than %g", where.c_str(), what, error, bound);
}

void test(const Sizes& s, const char* isa, int threads, std::mt19937_64& random) {
  const std::string where = std::string(isa) + " " + std::to_string(s.R) + " " + std::to_string(s.D) + " " +
                            std::to_string(s.M) + " " + std::to_string(threads);
  std::normal_distribution<double> normal;
  std::vector<float> in[INPUTS];
  Numbers exact[INPUTS], wanted[INPUTS];
  const auto draw = [&](std::vector<float>& numbers, int64_t n, double scale) {
    numbers.resize(n);
    for (float& x : numbers) x = float(scale * normal(random));
  };
  for (int i = 0; i < INPUTS; ++i) {
    const double fan = i == down ? double(s.M) : i == weight_ih || i == weight_hh || i == up ? double(s.D) : 1;
    draw(in[i], size(i, s), 1 / std::sqrt(std::max(fan, 1.0)));
    exact[i].assign(in[i].begin(), in[i].end());
  }
  std::vector<float> grad;
  draw(grad, s.R * s.D, 1);
  const Numbers expected = define(s, exact, Numbers(grad.begin(), grad.end()), wanted);

  const auto unwritten = [](int64_t n) { return std::vector<float>(n, NAN); };
  std::vector<float> result = unwritten(s.R * s.D), normed = result, rstd = unwritten(s.R);
  std::vector<float> x_gates = unwritten(s.R * 3 * s.D), h_gates = x_gates, hidden = unwritten(s.R * s.M);
  const auto common = [&](auto p) {
    p.R = s.R, p.D = s.D, p.M = s.M, p.threads = threads, p.eps = float(EPS);
    p.updates = in[updates].data(), p.slots = in[slots].data();
    p.weight_ih = in[weight_ih].data(), p.weight_hh = in[weight_hh].data();
    p.bias_ih = in[bias_ih].data(), p.bias_hh = in[bias_hh].data();
    p.norm_weight = in[norm].data(), p.norm_bias = in[norm_bias].data();
    p.up = in[up].data(), p.up_bias = in[up_bias].data(), p.down = in[down].data(), p.down_bias = in[down_bias].data();
    p.x_gates = x_gates.data(), p.h_gates = h_gates.data();
    p.normed = normed.data(), p.rstd = rstd.data(), p.hidden = hidden.data();
    return p;
  };
  auto forward = common(SlotUpdateForward{});
  forward.result = result.data();
  RECATTN_RUN(slot_update_forward, forward);
  compare("result", where, result, expected, s.D + s.M);

  // All gradients, and each by itself: what it is made of may not be skipped with the others.
  for (int only = -1; only < INPUTS; ++only) {
    std::vector<float> grads[INPUTS];
    float* to[INPUTS] = {};
    for (int i = 0; i < INPUTS; ++i) {
      if (only >= 0 && only != i) continue;
      grads[i] = unwritten(size(i, s));
      to[i] = grads[i].data();
    }
    auto backward = common(SlotUpdateBackward{});
    backward.grad_result = grad.data();
    backward.grad_updates = to[updates], backward.grad_slots = to[slots];
    backward.grad_weight_ih = to[weight_ih], backward.grad_weight_hh = to[weight_hh];
    backward.grad_bias_ih = to[bias_ih], backward.grad_bias_hh = to[bias_hh];
    backward.grad_norm_weight = to[norm], backward.grad_norm_bias = to[norm_bias];
    backward.grad_up = to[up], backward.grad_up_bias = to[up_bias];
    backward.grad_down = to[down], backward.grad_down_bias = to[down_bias];
    RECATTN_RUN(slot_update_backward, backward);
    for (int i = 0; i < INPUTS; ++i) {
      if (to[i]) compare(NAMES[i], where, grads[i], wanted[i], s.R + 3 * s.D + s.M);
    }
  }
}

}  // namespace

int test_slot_update(const std::vector<Isa>& isas) {
  int failed = 0;
  for (const Isa& isa : isas) {
    isa.take();
    failures = 0;
    std::mt19937_64 random(1);
    for (const Sizes& s : {Sizes{1, 1, 1}, {5, 7, 9}, {28, 64, 128}, {37, 65, 33}, {160, 130, 20}, {0, 8, 4}}) {
      for (const int threads : {1, 3}) test(s, isa.name, threads, random);
    }
    std::printf("%s: slot_update: %d failed checks\n", isa.name, failures);
    failed += failures;
  }
  return failed;
}

}  // namespace recattn
