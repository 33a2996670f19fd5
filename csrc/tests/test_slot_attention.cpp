// csrc/cpu/slot_attention_*.cpp against the formulas of their headers in double precision, one element after another.
//
// Every tensor is an allocation of its exact size, so that AddressSanitizer sees an access one element past it, and what
// is masked is NaN.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "../cpu/slot_attention.h"
#include "check.h"

namespace recattn {
namespace {

using Numbers = std::vector<double>;

struct Case {
  int64_t B, heads, K, N, D, Dv;
  bool shared, denominator, joint, masked;
};

template <class T>
Rows rows(std::vector<T>& data, const Case& c, int64_t n, int64_t width) {
  return {data.data(), sizeof(T) == 8 ? Dtype::float64 : Dtype::float32, c.heads * n * width, n * width, width};
}

template <class T>
struct Tensors {
  explicit Tensors(const Case& c)
      : q(c.B * c.heads * c.K * c.D), k(c.B * c.heads * c.N * c.D), v(c.shared ? 0 : c.B * c.heads * c.N * c.Dv),
        bias(c.B * c.heads * c.K), updates(c.B * c.heads * c.K * c.Dv), den(bias), du(updates),
        attn(c.B * c.heads * c.K * c.N), dattn(attn), dq(q), dk(k), dv(v), dbias(bias) {}
  std::vector<T> q, k, v, bias, updates, den, du, attn, dattn, dq, dk, dv, dbias;
};

// The same in double, by the definition.
void define(const Case& c, const std::vector<uint8_t>& slots, const std::vector<uint8_t>& inputs, double scale, double eps,
            Tensors<double>& t) {
  const std::vector<double>& values = c.shared ? t.k : t.v;
  std::vector<double>& dvalues = c.shared ? t.dk : t.dv;
  const int64_t group = c.joint ? c.heads : 1, J = group * c.K;
  for (auto* x : {&t.updates, &t.den, &t.attn, &t.dq, &t.dk, &t.dv, &t.dbias}) std::fill(x->begin(), x->end(), 0.0);
  for (int64_t s = 0; s < c.B * c.heads / group; ++s) {
    const int64_t b = s * group / c.heads;
    const auto head = [&](int64_t j) { return s * group + j / c.K; };
    const auto valid = [&](int64_t j) { return slots[b * c.K + j % c.K] != 0; };
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t n = 0; n < c.N; ++n) {
        if (!inputs[b * c.N + n]) continue;
        Numbers a(J), ds(J);
        double most = -INFINITY, sum = 0, along = 0;
        for (int64_t j = 0; j < J; ++j) {
          if (!valid(j)) continue;
          const int64_t row = s * J + j;
          for (int64_t d = 0; d < c.D; ++d) a[j] += scale * t.q[row * c.D + d] * t.k[(head(j) * c.N + n) * c.D + d];
          most = std::fmax(most, a[j] += t.bias[row]);
        }
        for (int64_t j = 0; j < J; ++j) sum += a[j] = valid(j) ? std::exp(a[j] - most) : 0;
        for (int64_t j = 0; j < J; ++j) {
          if (!valid(j)) continue;
          const int64_t row = s * J + j, at = head(j) * c.N + n;
          a[j] /= sum;
          t.attn[row * c.N + n] = a[j];
          const double weight = a[j] + (c.denominator ? 0 : eps);
          if (pass == 0) {
            t.den[row] += weight;
            for (int64_t d = 0; d < c.Dv; ++d) t.updates[row * c.Dv + d] += weight * values[at * c.Dv + d];
            continue;
          }
          ds[j] = t.dattn[row * c.N + n];
          for (int64_t d = 0; d < c.Dv; ++d) {
            const double g = t.du[row * c.Dv + d] / t.den[row];
            ds[j] += g * (values[at * c.Dv + d] - t.updates[row * c.Dv + d]);
            dvalues[at * c.Dv + d] += weight * g;
          }
          along += a[j] * ds[j];
        }
        for (int64_t j = 0; pass == 1 && j < J; ++j) {
          if (!valid(j)) continue;
          const int64_t row = s * J + j, at = head(j) * c.N + n;
          const double slope = a[j] * (ds[j] - along);
          t.dbias[row] += slope;
          for (int64_t d = 0; d < c.D; ++d) {
            t.dq[row * c.D + d] += scale * slope * t.k[at * c.D + d];
            t.dk[at * c.D + d] += scale * slope * t.q[row * c.D + d];
          }
        }
      }
      for (int64_t j = 0; pass == 0 && j < J; ++j) {
        const int64_t row = s * J + j;
        if (c.denominator && valid(j)) t.den[row] += eps;
        for (int64_t d = 0; t.den[row] != 0 && d < c.Dv; ++d) t.updates[row * c.Dv + d] /= t.den[row];
      }
    }
  }
}

template <class T>
void compare(const char* name, const std::vector<T>& got, const Numbers& want, const std::string& text,
             double largest = 1e-30) {
  for (const double w : want) largest = std::fmax(largest, std::fabs(w));
  for (size_t i = 0; i < want.size(); ++i) {
    CHECK(std::fabs(double(got[i]) - want[i]) <= largest * std::numeric_limits<T>::epsilon() * 100,
          "%s[%d] is %g, not %g: %s", name, int(i), double(got[i]), want[i], text.c_str());
  }
}

// Two calls whose rows lie between others, the second with -3 times the gradient of the first: -2 times its dk and dv.
template <class T>
void compare_calls(const Case& c, SlotAttentionBackward p, Tensors<T>& t, const std::string& text) {
  p.grad_attn = Rows{}, p.grad_q = p.grad_bias = nullptr;
  RECATTN_RUN(slot_attention_backward, p);
  const auto twice = [](const std::vector<T>& x) {
    Numbers to(x.begin(), x.end());
    for (double& value : to) value *= -2;
    return to;
  };
  const Numbers dk = twice(t.dk), dv = twice(t.dv);
  const int64_t slots = c.B * c.heads * c.K, step = c.D + 2 * c.Dv + 2;
  std::vector<T> calls(2 * slots * step);
  for (int64_t i = 0; i < 2 * slots; ++i) {
    const int64_t slot = i % slots;
    T* to = calls.data() + i * step;
    to = std::copy_n(t.q.data() + slot * c.D, c.D, to);
    for (int64_t d = 0; d < c.Dv; ++d) *to++ = t.du[slot * c.Dv + d] * T(i < slots ? 1 : -3);
    to = std::copy_n(t.updates.data() + slot * c.Dv, c.Dv, to);
    *to++ = t.bias[slot];
    *to = t.den[slot];
  }
  const T* const first = calls.data();
  p.times = 2, p.q = {first, step}, p.grad_updates = {first + c.D, step}, p.updates = {first + c.D + c.Dv, step};
  p.bias = {first + c.D + 2 * c.Dv, step}, p.den = {first + step - 1, step};
  RECATTN_RUN(slot_attention_backward, p);
  // Of one input dk is 0: the update is its value whatever A is. What it is a difference of has the size of dv.
  double largest = 0;
  for (const double value : c.shared ? dk : dv) largest = std::fmax(largest, std::fabs(value));
  compare("dk of two calls", t.dk, dk, text, largest);
  compare("dv of two calls", t.dv, dv, text, largest);
  p.add = true;
  RECATTN_RUN(slot_attention_backward, p);
  const auto doubled = [](Numbers x) {
    for (double& value : x) value *= 2;
    return x;
  };
  compare("dk added to", t.dk, doubled(dk), text, 2 * largest);
  compare("dv added to", t.dv, doubled(dv), text, 2 * largest);
}

template <class T>
void run(const std::vector<Isa>& isas, const Case& c, std::mt19937_64& random) {
  Tensors<double> exact(c);
  std::vector<uint8_t> slots(c.B * c.K, 1), inputs(c.B * c.N, 1);
  std::normal_distribution<double> normal;
  for (auto* x : {&exact.q, &exact.k, &exact.v, &exact.bias, &exact.du, &exact.dattn}) {
    for (double& value : *x) value = T(normal(random));
  }
  if (c.masked) {
    for (uint8_t& m : slots) m = random() % 4 != 0;
    for (uint8_t& m : inputs) m = random() % 4 != 0;
  }
  const double scale = 0.4, eps = 1e-2;
  define(c, slots, inputs, scale, eps, exact);
  Tensors<T> t(c);
  const auto copy = [](std::vector<T>& to, const Numbers& from) { to.assign(from.begin(), from.end()); };
  copy(t.q, exact.q), copy(t.k, exact.k), copy(t.v, exact.v), copy(t.bias, exact.bias);
  copy(t.du, exact.du), copy(t.dattn, exact.dattn);
  for (int64_t i = 0; i < c.B * c.heads * c.N; ++i) {
    if (inputs[i / c.N / c.heads * c.N + i % c.N]) continue;
    for (int64_t d = 0; d < c.D; ++d) t.k[i * c.D + d] = T(NAN);
    for (int64_t d = 0; !c.shared && d < c.Dv; ++d) t.v[i * c.Dv + d] = T(NAN);
  }
  const auto common = [&](SlotAttention& p, int threads) {
    p = {c.B, c.heads, c.K, c.N, c.D, c.Dv, sizeof(T) == 8, scale, eps, c.denominator, c.joint, threads,
         {t.q.data(), c.D}, rows(t.k, c, c.N, c.D), c.shared ? Rows{} : rows(t.v, c, c.N, c.Dv), {t.bias.data(), 1},
         c.masked ? slots.data() : nullptr, c.masked ? inputs.data() : nullptr};
  };
  // As many as ever, so that the cases that follow do not depend on how many instruction sets this machine has.
  int counts[3];
  for (int& count : counts) count = 1 + int(random() % 3);
  for (const Isa& isa : isas) {
    const int threads = counts[isa.place % 3];
    std::string text = isa.name;
    for (const int64_t n : {c.B, c.heads, c.K, c.N, c.D, c.Dv}) text += " " + std::to_string(n);
    SlotAttentionForward f{};
    common(f, threads);
    f.updates = t.updates.data(), f.den = t.den.data(), f.attn = rows(t.attn, c, c.K, c.N);
    std::fill(t.attn.begin(), t.attn.end(), T(0));
    isa.take();
    RECATTN_RUN(slot_attention_forward, f);
    compare("updates", t.updates, exact.updates, text);
    compare("attn", t.attn, exact.attn, text);
    SlotAttentionBackward g{};
    common(g, threads);
    g.times = 1, g.updates = {f.updates, c.Dv}, g.den = {f.den, 1}, g.grad_updates = {t.du.data(), c.Dv};
    g.grad_attn = rows(t.dattn, c, c.K, c.N);
    for (auto* x : {&t.dk, &t.dv}) std::fill(x->begin(), x->end(), T(0));
    g.grad_k = rows(t.dk, c, c.N, c.D), g.grad_v = c.shared ? Rows{} : rows(t.dv, c, c.N, c.Dv);
    g.grad_q = t.dq.data(), g.grad_bias = t.dbias.data();
    isa.take();
    RECATTN_RUN(slot_attention_backward, g);
    compare("dq", t.dq, exact.dq, text);
    compare("dk", t.dk, exact.dk, text);
    compare("dv", t.dv, exact.dv, text);
    compare("dbias", t.dbias, exact.dbias, text);
    compare_calls(c, g, t, text);
  }
}

}  // namespace

int test_slot_attention(const std::vector<Isa>& isas) {
  std::mt19937_64 random(0);
  int cases = 0;
  for (const int64_t K : {1, 7, 13}) {
    for (const int64_t N : {1, 64, 130, 600}) {
      for (const int64_t D : {1, 16, 33, 64}) {
        const bool shared = random() % 2;
        const Case c = {1 + int64_t(random() % 2), 1 + int64_t(random() % 2), K, N, D, shared ? D : 1 + D / 2, shared,
                        random() % 2 == 0, random() % 2 == 0, random() % 2 == 0};
        random() % 2 ? run<double>(isas, c, random) : run<float>(isas, c, random);
        ++cases;
      }
    }
  }
  std::printf("slot_attention: %d cases on each instruction set: %d failed checks\n", cases, failures);
  return failures;
}

}  // namespace recattn
