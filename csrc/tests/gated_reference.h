// rnn, lstm and gru, forward and backward, written from their definitions in double precision. test_gated.cpp checks
// the gradients by differences before it holds the kernels to them.
#pragma once

#include <algorithm>

#include "reference.h"

namespace recattn {
namespace {

using Numbers = std::vector<double>;

struct GatedCase {
  int64_t T, B, H;
  Cell cell;
  bool bias, ln, h0, c0, reset, lengths, packed, reverse, clip, grad_output, grad_h_n, grad_c_n, nan;
  bool coarse;  // weights of bfloat16 whatever the type
  int zoneout;  // 0: none, 1: masks, 2: rates
  int threads;

  int64_t G() const { return cell == Cell::lstm ? 4 : cell == Cell::gru || cell == Cell::gru_before ? 3 : 1; }
  double limit() const { return clip ? 0.25 : INFINITY; }
  double rate_h() const { return zoneout == 2 ? 0.125 : 0; }
  double rate_c() const { return zoneout == 2 ? 0.25 : 0; }
};

// The tensors that a gradient is taken of, or those gradients. What a case has not is 0, the weights of norms 1.
struct GatedTensors {
  Numbers x, weight, bias, ln_weight, ln_bias, ln_c_weight, ln_c_bias, h0, c0;

  explicit GatedTensors(const GatedCase& c)
      : x(c.T * c.B * c.G() * c.H), weight(c.G() * c.H * c.H), bias(c.G() * c.H), ln_weight(c.G() * c.H),
        ln_bias(c.G() * c.H), ln_c_weight(c.H), ln_c_bias(c.H), h0(c.B * c.H), c0(c.B * c.H) {}
  std::vector<Numbers*> all() {
    return {&x, &weight, &bias, &ln_weight, &ln_bias, &ln_c_weight, &ln_c_bias, &h0, &c0};
  }
};

struct Norm {
  Numbers normed;
  double rstd = 0;

  void forward(const double* v, int64_t n) {
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < n; ++i) mean += v[i] / n;
    for (int64_t i = 0; i < n; ++i) variance += (v[i] - mean) * (v[i] - mean) / n;
    rstd = 1 / std::sqrt(variance + 1e-5);
    normed.resize(n);
    for (int64_t i = 0; i < n; ++i) normed[i] = (v[i] - mean) * rstd;
  }
  void backward(double* grad) const {
    const int64_t n = normed.size();
    double mean = 0, along = 0;
    for (int64_t i = 0; i < n; ++i) mean += grad[i] / n, along += grad[i] * normed[i] / n;
    for (int64_t i = 0; i < n; ++i) grad[i] = rstd * (grad[i] - mean - normed[i] * along);
  }
};

double sigmoid_of(double v) { return 1 / (1 + std::exp(-v)); }
double clipped(double v, double limit) { return v > limit ? limit : v < -limit ? -limit : v; }

class GatedReference {
 public:
  // keep_h and keep_c: (T, B, H); reset (T, B), lengths (B). Empty where the case has none.
  GatedReference(const GatedCase& c, const std::vector<uint8_t>& reset, const std::vector<int64_t>& lengths,
                 const std::vector<uint8_t>& keep_h, const std::vector<uint8_t>& keep_c)
      : c(c), reset(reset), lengths(lengths), keep_h(keep_h), keep_c(keep_c) {}

  bool ended(int64_t t, int64_t b) const { return !lengths.empty() && t >= lengths[b]; }

  Numbers output, h_n, c_n;

  void forward(const GatedTensors& in) {
    const int64_t T = c.T, B = c.B, H = c.H, G = c.G();
    output.assign(T * B * H, 0);
    steps.assign(T * B, {});
    h_n = in.h0;
    c_n = in.c0;
    for (int64_t number = 0; number < T; ++number) {
      const int64_t t = c.reverse ? T - 1 - number : number;
      for (int64_t b = 0; b < B; ++b) {
        if (ended(t, b)) continue;
        Step& s = steps[t * B + b];
        s.h.assign(h_n.begin() + b * H, h_n.begin() + (b + 1) * H);
        s.c.assign(c_n.begin() + b * H, c_n.begin() + (b + 1) * H);
        if (resets(t, b)) s.h.assign(H, 0), s.c.assign(H, 0);
        Numbers q = times(in.weight.data(), s.h, G * H);
        if (c.ln) {
          s.norm.forward(q.data(), G * H);
          for (int64_t i = 0; i < G * H; ++i) q[i] = s.norm.normed[i] * in.ln_weight[i] + in.ln_bias[i];
        }
        for (int64_t i = 0; i < G * H; ++i) q[i] += in.bias[i];
        const double* x = &in.x[(t * B + b) * G * H];
        Numbers h(H), cell(H);
        s.gates.assign(G * H, 0);
        double* a = s.gates.data();
        for (int64_t i = 0; i < H; ++i) {
          switch (c.cell) {
            case Cell::rnn_tanh: h[i] = a[i] = std::tanh(x[i] + q[i]); break;
            case Cell::rnn_relu: h[i] = a[i] = act(Activation::relu, x[i] + q[i], 0); break;
            case Cell::lstm:
              for (const int g : {0, 1, 3}) a[g * H + i] = sigmoid_of(x[g * H + i] + q[g * H + i]);
              a[2 * H + i] = std::tanh(x[2 * H + i] + q[2 * H + i]);
              cell[i] = a[H + i] * s.c[i] + a[i] * a[2 * H + i];
              break;
            case Cell::gru:
            case Cell::gru_before:
              for (const int g : {0, 1}) a[g * H + i] = sigmoid_of(x[g * H + i] + q[g * H + i]);
              break;
          }
        }
        if (c.cell == Cell::lstm) {
          s.squashed = cell;
          if (c.ln) s.norm_c.forward(cell.data(), H);
          for (int64_t i = 0; i < H; ++i) {
            if (c.ln) s.squashed[i] = s.norm_c.normed[i] * in.ln_c_weight[i] + in.ln_c_bias[i];
            s.squashed[i] = std::tanh(s.squashed[i]);
            h[i] = a[3 * H + i] * s.squashed[i];
          }
        }
        if (c.cell == Cell::gru) {
          for (int64_t i = 0; i < H; ++i) a[2 * H + i] = std::tanh(x[2 * H + i] + a[i] * q[2 * H + i]);
          s.q_n.assign(q.begin() + 2 * H, q.end());
        }
        if (c.cell == Cell::gru_before) {
          Numbers rh(H);
          for (int64_t i = 0; i < H; ++i) rh[i] = a[i] * s.h[i];
          const Numbers n = times(&in.weight[2 * H * H], rh, H);
          for (int64_t i = 0; i < H; ++i) a[2 * H + i] = std::tanh(x[2 * H + i] + n[i] + in.bias[2 * H + i]);
        }
        for (int64_t i = 0; i < H; ++i) {
          if (G == 3) h[i] = (1 - a[H + i]) * a[2 * H + i] + a[H + i] * s.h[i];
          h_n[b * H + i] = mixed(keep_h, t, b, i, c.rate_h(), s.h[i], h[i]);
          c_n[b * H + i] = mixed(keep_c, t, b, i, c.rate_c(), s.c[i], cell[i]);
          output[(t * B + b) * H + i] = h_n[b * H + i];
        }
      }
    }
  }

  // stored: the output as the kernel stored it, from which it reads h[t-1].
  GatedTensors backward(const GatedTensors& in, const Numbers& stored, const Numbers& dy, const Numbers& dh_n,
                        const Numbers& dc_n) const {
    const int64_t T = c.T, B = c.B, H = c.H, G = c.G();
    GatedTensors d(c);
    d.h0 = dh_n;
    d.c0 = dc_n;
    for (int64_t number = T - 1; number >= 0; --number) {
      const int64_t t = c.reverse ? T - 1 - number : number, before = c.reverse ? t + 1 : t - 1;
      for (int64_t b = 0; b < B; ++b) {
        if (ended(t, b)) continue;
        const Step& s = steps[t * B + b];
        const double* a = s.gates.data();
        Numbers h = s.h, dq(G * H), dnew(H), dcell(H), flow(H), flow_c(H), to_tanh(H);
        double* dx = &d.x[(t * B + b) * G * H];
        for (int64_t i = 0; i < H; ++i) {
          if (!resets(t, b) && before >= 0 && before < T && !ended(before, b)) h[i] = stored[(before * B + b) * H + i];
          const double dh = clipped(dy[(t * B + b) * H + i] + d.h0[b * H + i], c.limit());
          const double dc = clipped(d.c0[b * H + i], c.limit());
          flow[i] = share(keep_h, t, b, i, c.rate_h(), dh, true);
          dnew[i] = share(keep_h, t, b, i, c.rate_h(), dh, false);
          flow_c[i] = share(keep_c, t, b, i, c.rate_c(), dc, true);
          dcell[i] = share(keep_c, t, b, i, c.rate_c(), dc, false);
        }
        const auto slope = [&](int64_t at) { return a[at] * (1 - a[at]); };
        if (c.cell == Cell::rnn_tanh || c.cell == Cell::rnn_relu) {
          const Activation activation = c.cell == Cell::rnn_relu ? Activation::relu : Activation::tanh;
          for (int64_t i = 0; i < H; ++i) {
            const double derivative = act_derivative(activation, a[i], 0);
            dx[i] = dq[i] = masks(activation) && derivative == 0 ? 0 : dnew[i] * derivative;
          }
        }
        if (c.cell == Cell::lstm) {
          for (int64_t i = 0; i < H; ++i) {
            to_tanh[i] = dnew[i] * a[3 * H + i] * (1 - s.squashed[i] * s.squashed[i]);
            if (c.ln) {
              d.ln_c_weight[i] += to_tanh[i] * s.norm_c.normed[i];
              d.ln_c_bias[i] += to_tanh[i];
              to_tanh[i] *= in.ln_c_weight[i];
            }
          }
          if (c.ln) s.norm_c.backward(to_tanh.data());
          for (int64_t i = 0; i < H; ++i) {
            const double dc = dcell[i] + to_tanh[i], g = a[2 * H + i];
            dq[i] = dc * g * slope(i);
            dq[H + i] = dc * s.c[i] * slope(H + i);
            dq[2 * H + i] = dc * a[i] * (1 - g * g);
            dq[3 * H + i] = dnew[i] * s.squashed[i] * slope(3 * H + i);
            flow_c[i] += dc * a[H + i];
          }
          std::copy(dq.begin(), dq.end(), dx);
        }
        if (G == 3) {
          for (int64_t i = 0; i < H; ++i) {
            const double z = a[H + i], n = a[2 * H + i];
            dx[H + i] = dq[H + i] = dnew[i] * (h[i] - n) * slope(H + i);
            dx[2 * H + i] = dq[2 * H + i] = dnew[i] * (1 - z) * (1 - n * n);
            flow[i] += dnew[i] * z;
          }
        }
        if (c.cell == Cell::gru) {
          for (int64_t i = 0; i < H; ++i) {
            dx[i] = dq[i] = dq[2 * H + i] * s.q_n[i] * slope(i);
            dq[2 * H + i] *= a[i];
          }
        }
        for (int64_t i = 0; i < G * H; ++i) d.bias[i] += dq[i];
        int64_t rows = G * H;
        if (c.cell == Cell::gru_before) {
          rows = 2 * H;
          for (int64_t k = 0; k < H; ++k) {
            double to_rh = 0;
            for (int64_t m = 0; m < H; ++m) {
              to_rh += in.weight[(2 * H + m) * H + k] * dq[2 * H + m];
              d.weight[(2 * H + m) * H + k] += dq[2 * H + m] * (a[k] * h[k]);
            }
            dx[k] = dq[k] = to_rh * h[k] * slope(k);
            flow[k] += to_rh * a[k];
          }
          for (int64_t i = 0; i < H; ++i) d.bias[i] += dq[i];  // dr was 0 above
        }
        if (c.ln) {
          for (int64_t i = 0; i < G * H; ++i) {
            d.ln_weight[i] += dq[i] * s.norm.normed[i];
            d.ln_bias[i] += dq[i];
            dq[i] *= in.ln_weight[i];
          }
          s.norm.backward(dq.data());
        }
        for (int64_t m = 0; m < rows; ++m) {
          for (int64_t k = 0; k < H; ++k) {
            d.weight[m * H + k] += dq[m] * h[k];
            flow[k] += in.weight[m * H + k] * dq[m];
          }
        }
        for (int64_t i = 0; i < H; ++i) {
          d.h0[b * H + i] = resets(t, b) ? 0 : flow[i];
          d.c0[b * H + i] = resets(t, b) ? 0 : flow_c[i];
        }
      }
    }
    return d;
  }

 private:
  struct Step {
    Numbers h, c, gates, q_n, squashed;  // h, c: the states before
    Norm norm, norm_c;
  };

  bool resets(int64_t t, int64_t b) const { return !reset.empty() && reset[t * c.B + b]; }

  Numbers times(const double* weight, const Numbers& h, int64_t rows) const {
    Numbers q(rows);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t k = 0; k < c.H; ++k) q[m] += weight[m * c.H + k] * h[k];
    }
    return q;
  }

  double mixed(const std::vector<uint8_t>& keep, int64_t t, int64_t b, int64_t i, double rate, double prev,
               double next) const {
    if (!keep.empty()) return keep[(t * c.B + b) * c.H + i] ? prev : next;
    return rate == 0 ? next : rate * prev + (1 - rate) * next;
  }
  double share(const std::vector<uint8_t>& keep, int64_t t, int64_t b, int64_t i, double rate, double grad,
               bool of_prev) const {
    if (!keep.empty()) return bool(keep[(t * c.B + b) * c.H + i]) == of_prev ? grad : 0;
    if (rate == 0) return of_prev ? 0 : grad;
    return (of_prev ? rate : 1 - rate) * grad;
  }

  const GatedCase& c;
  const std::vector<uint8_t>& reset;
  const std::vector<int64_t>& lengths;
  const std::vector<uint8_t>&keep_h, &keep_c;
  std::vector<Step> steps;
};

}  // namespace
}  // namespace recattn
