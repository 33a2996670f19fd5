// csrc/cpu/additive_*.cpp against loops in double precision.
//
// Every tensor is an allocation of its exact size, so that AddressSanitizer sees an access one element past it; what
// lies between the elements of keys and values, and whatever is masked, is NaN.
#include <cmath>
#include <random>

#include "../cpu/additive.h"
#include "check.h"

namespace recattn {
namespace {

using Random = std::mt19937_64;

template <class T>
std::vector<T> draw(int64_t n, Random& random) {
  std::vector<T> numbers(n);
  for (T& v : numbers) v = T(std::normal_distribution<double>()(random));
  return numbers;
}

// (B, N, width) with gaps between its rows.
template <class T>
struct Rows {
  Rows(int64_t B, int64_t N, int64_t width, int64_t gap, const std::vector<uint8_t>& mask, Random& random)
      : stride_n(width + gap), stride_b(N * stride_n), memory(B * N * width > 0 ? B * stride_b - gap : 0, T(NAN)) {
    for (int64_t i = 0; i < B * N; ++i) {
      for (int64_t j = 0; j < width && mask[i]; ++j) memory[i * stride_n + j] = draw<T>(1, random)[0];
    }
  }
  Positions positions() const {
    return {memory.data(), stride_b, stride_n, sizeof(T) == 8 ? Dtype::float64 : Dtype::float32};
  }
  double at(int64_t i, int64_t j) const { return memory[i * stride_n + j]; }

  int64_t stride_n, stride_b;
  std::vector<T> memory;
};

template <class T>
struct Results {
  Results(const Additive& p, int64_t blocks)
      : softmax(p.B * p.N), context(p.B * p.D), scores(p.B * p.N), sums(2 * p.B * blocks * p.A), query(p.B * p.A),
        keys(p.B * p.N * p.A), weight(p.A), values(p.B * p.N * p.D) {}
  std::vector<T> softmax, context, scores, sums, query, keys, weight, values;
};

template <class T>
void check(const std::vector<T>& got, const std::vector<double>& want, double bound, const char* name, const char* isa,
           const Additive& p) {
  double most = 1e-30;
  for (const double v : want) most = std::fmax(most, std::fabs(v));
  for (size_t i = 0; i < want.size(); ++i) {
    CHECK(std::fabs(got[i] - want[i]) <= bound * most, "%s[%d] is %.9g, not %.9g: %s, B N A D %d %d %d %d", name, int(i),
          double(got[i]), want[i], isa, int(p.B), int(p.N), int(p.A), int(p.D));
  }
}

template <class T>
void check_case(const std::vector<Isa>& isas, int64_t B, int64_t N, int64_t A, int64_t D, bool tanh, bool masked,
                Random& random) {
  std::vector<uint8_t> mask(B * N, 1);
  for (int64_t i = 0; masked && i < B * N; ++i) mask[i] = i >= N && random() % 3 > 0;  // the first row: nothing
  const Rows<T> keys(B, N, A, 3, mask, random), values(B, N, D, masked ? 1 : 0, mask, random);
  const auto query = draw<T>(B * A, random), grad_context = draw<T>(B * D, random), grad_weights = draw<T>(B * N, random);
  auto weight = draw<T>(A, random);
  for (T& w : weight) w = T(w / std::sqrt(double(A)));

  AdditiveBackward p{};
  p.B = B, p.N = N, p.A = A, p.D = D;
  p.wide = sizeof(T) == 8;
  p.activation = tanh ? Activation::tanh : Activation::relu;
  p.keys = keys.positions(), p.values = values.positions();
  p.query = query.data(), p.weight = weight.data();
  p.mask = masked ? mask.data() : nullptr;
  p.mask_stride_b = N, p.mask_stride_n = 1;
  p.grad_context = grad_context.data(), p.grad_weights = grad_weights.data();

  std::vector<double> a(B * N), context(B * D), dquery(B * A), dkeys(B * N * A), dweight(A), dvalues(B * N * D);
  for (int64_t b = 0; b < B; ++b) {
    const auto act = [&](int64_t i, int64_t j) {
      const double v = keys.at(i, j) + query[b * A + j];
      return tanh ? std::tanh(v) : v > 0 ? v : 0;
    };
    std::vector<int64_t> kept;
    for (int64_t i = b * N; i < (b + 1) * N; ++i) {
      if (mask[i]) kept.push_back(i);
    }
    double sum = 0, mean = 0;
    for (const int64_t i : kept) {
      for (int64_t j = 0; j < A; ++j) a[i] += weight[j] * act(i, j);
      sum += a[i] = std::exp(a[i]);
    }
    std::vector<double> da(B * N);
    for (const int64_t i : kept) {
      a[i] /= sum;
      da[i] = grad_weights[i];
      for (int64_t d = 0; d < D; ++d) {
        context[b * D + d] += a[i] * values.at(i, d);
        dvalues[i * D + d] = a[i] * grad_context[b * D + d];
        da[i] += values.at(i, d) * grad_context[b * D + d];
      }
      mean += a[i] * da[i];
    }
    for (const int64_t i : kept) {
      const double de = a[i] * (da[i] - mean);
      for (int64_t j = 0; j < A; ++j) {
        const double h = act(i, j), slope = tanh ? 1 - h * h : h > 0;
        dquery[b * A + j] += dkeys[i * A + j] = de * weight[j] * slope;
        dweight[j] += de * h;
      }
    }
  }

  const int64_t blocks = (N + AdditiveBackward::ROWS - 1) / AdditiveBackward::ROWS;
  for (const Isa& isa : isas) {
    for (int threads = 1; threads <= 3; threads += 2) {
      Results<T> r(p, blocks);
      p.threads = threads;
      AdditiveForward forward{};
      static_cast<Additive&>(forward) = p;
      forward.softmax = r.softmax.data(), forward.context = r.context.data();
      isa.take();
      RECATTN_RUN(additive_forward, forward);
      p.softmax = r.softmax.data(), p.scores = r.scores.data(), p.sums = r.sums.data();
      p.grad_query = r.query.data(), p.grad_keys = r.keys.data(), p.grad_weight = r.weight.data();
      p.grad_values = r.values.data();
      isa.take();
      RECATTN_RUN(additive_backward, p);
      const double bound = sizeof(T) == 8 ? 1e-12 : 3e-5;
      check(r.softmax, a, bound, "softmax", isa.name, p);
      check(r.context, context, bound, "context", isa.name, p);
      check(r.query, dquery, bound, "dquery", isa.name, p);
      check(r.keys, dkeys, bound, "dkeys", isa.name, p);
      check(r.weight, dweight, bound, "dweight", isa.name, p);
      check(r.values, dvalues, bound, "dvalues", isa.name, p);
    }
  }
}

}  // namespace

int test_additive(const std::vector<Isa>& isas) {
  Random random(0);
  int cases = 0;
  constexpr int64_t sizes[][4] = {{1, 1, 1, 1},  {2, 9, 63, 65},   {3, 33, 64, 64}, {2, 70, 130, 300},
                                  {1, 5, 0, 7},  {2, 5, 7, 0},     {2, 0, 5, 3},    {0, 4, 4, 4},
                                  {1, 40, 20, 700}};
  for (const auto& [B, N, A, D] : sizes) {
    for (int options = 0; options < 4; ++options, ++cases) {
      check_case<float>(isas, B, N, A, D, options & 1, options & 2, random);
      check_case<double>(isas, B, N, A, D, options & 1, options & 2, random);
    }
  }
  std::printf("additive attention: %d cases on each instruction set: %d failed checks\n", cases, failures);
  return failures;
}

}  // namespace recattn
