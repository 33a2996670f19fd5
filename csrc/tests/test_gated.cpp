// csrc/cpu/gated_*.cpp against gated_reference.h.
#include <algorithm>
#include <numeric>
#include <string>

#include "gated_reference.h"
#include "sequences.h"

namespace recattn {
namespace {

template <class S>
std::vector<S> canaries(int64_t n) {
  return std::vector<S>(n, canary<S>());
}

template <class S>
class GatedTest {
  using R = typename Type<S>::R;
  static constexpr bool NARROW = sizeof(S) == 2;

 public:
  GatedTest(const GatedCase& c, Random& random)
      : c(c), random(random), in(c), lengths(draw_lengths()),
        starts(c.packed ? starts_of(c.T, lengths) : std::vector<int64_t>()), x(rows(c.G() * c.H)), dy(rows(c.H)), output(rows(c.H)), dx(rows(c.G() * c.H)),
        dh_n(c.B * c.H), dc_n(c.B * c.H), reference(this->c, reset, lengths, keep_h, keep_c) {
    const double scale = 1.5 / std::sqrt(double(c.H));
    draw(true, c.G() * c.H * c.H, scale, weight, in.weight);
    for (size_t i = 0; c.coarse && i < weight.size(); ++i) {
      in.weight[i] = weight[i] = R(std::rint(weight[i] * 128) / 128);
    }
    draw(c.bias, c.G() * c.H, 0.5, bias, in.bias);
    draw(c.ln, c.G() * c.H, 1, ln_weight, in.ln_weight);
    draw(c.ln, c.G() * c.H, 0.5, ln_bias, in.ln_bias);
    draw(c.ln && c.cell == Cell::lstm, c.H, 1, ln_c_weight, in.ln_c_weight);
    draw(c.ln && c.cell == Cell::lstm, c.H, 0.5, ln_c_bias, in.ln_c_bias);
    draw(c.h0, c.B * c.H, 1, h0, in.h0);
    draw(c.c0, c.B * c.H, 1, c0, in.c0);
    draw(c.grad_h_n, c.B * c.H, 1, grad_h_n, dh_n);
    draw(c.grad_c_n && c.cell == Cell::lstm, c.B * c.H, 1, grad_c_n, dc_n);
    for (int64_t i = 0; c.reset && i < c.T * c.B; ++i) reset.push_back(random() % 4 == 0);
    for (int64_t i = 0; c.zoneout == 1 && i < c.T * c.B * c.H; ++i) {
      keep_h.push_back(random() % 4 == 0);
      keep_c.push_back(random() % 4 == 0);
    }
    for (Rows<S>* drawn : {&x, &dy}) {
      drawn->each([&](int64_t t, int64_t b, S& v) {
        if (!reference.ended(t, b)) v = Type<S>::draw(random, 0);
      });
    }
    if (c.nan && c.T * c.B > 0) {
      const int64_t t = c.packed ? 0 : c.T / 2, b = c.packed ? 0 : c.B / 2;  // a row that there is
      if (!reference.ended(t, b) || !c.packed) x.at(t, b, c.H / 2) = canary<S>();
      if (!reference.ended(t, 0) || !c.packed) dy.at(t, 0, 0) = canary<S>();
    }
    in.x = x.values();
    grad_output = dy.values();
    if (!c.grad_output) grad_output.assign(grad_output.size(), 0);
  }

  void run(const std::vector<Isa>& isas) {
    reference.forward(in);
    for (const Isa& isa : isas) {
      name = isa.name;
      check_forward(isa);
      check_backward(isa);
    }
  }

 private:
  bool coin() { return random() % 2 == 0; }
  std::vector<int64_t> draw_lengths() {
    std::vector<int64_t> drawn;
    for (int64_t b = 0, kind = random() % 3; c.lengths && b < c.B; ++b, ++kind) {
      drawn.push_back(kind % 3 == 0 ? 0 : kind % 3 == 1 ? c.T : int64_t(random() % uint64_t(c.T + 1)));
    }
    if (c.packed) std::sort(drawn.rbegin(), drawn.rend());
    return drawn;
  }
  // How many rows of what is kept there are.
  int64_t kept_rows() const {
    return starts.empty() ? c.T * c.B : std::accumulate(lengths.begin(), lengths.end(), int64_t(0));
  }
  Rows<S> rows(int64_t width) {
    if (c.packed) return {c.T, c.B, width, Layout::packed, coin() ? 0 : 3, lengths};
    const Layout layout = coin() ? Layout::batch_first : Layout::padded;
    return {c.T, c.B, width, layout, coin() ? 0 : 3};
  }

  void draw(bool there, int64_t n, double scale, std::vector<R>& to, Numbers& exact) {
    exact.assign(n, 0);
    for (int64_t i = 0; there && i < n; ++i) {
      to.push_back(R(uniform(random, -scale, scale)));
      exact[i] = to[i];
    }
  }

  std::string text() const {
    const auto number = [](int64_t n) { return " " + std::to_string(n); };
    std::string words = name + " dtype" + number(int(Type<S>::dtype)) + ", cell" + number(int(c.cell)) + ", T B H" +
                        number(c.T) + number(c.B) + number(c.H) + ", threads" + number(c.threads) + ", zoneout" +
                        number(c.zoneout);
    const std::pair<bool, const char*> options[] = {
        {c.bias, ", bias"}, {c.ln, ", ln"}, {c.h0, ", h0"}, {c.c0, ", c0"}, {c.reset, ", reset"},
        {c.lengths, ", lengths"}, {c.packed, ", packed"}, {c.reverse, ", reverse"}, {c.clip, ", clip"}, {c.nan, ", NaN"},
        {c.coarse, ", coarse weights"},
        {c.grad_output, ", grad_output"}, {c.grad_h_n, ", grad_h_n"}, {c.grad_c_n, ", grad_c_n"}};
    for (const auto& [on, word] : options) words += on ? word : "";
    return words;
  }

  // Of a result in R, relative to the largest number of its tensor, or to 1. The kernels' sums have at most some hundred
  // terms; a layer norm may multiply the error of a row by 1 / sqrt(1e-5).
  double error() const { return (sizeof(R) == 4 ? 2e-5 : 1e-13) * (c.ln ? 20 : 1); }

  void check_numbers(const char* what, const Numbers& got, const Numbers& want, double store_epsilon = 0,
                     double store_least = 0) {
    double largest = 1;
    for (const double v : want) {
      if (std::fabs(v) > largest) largest = std::fabs(v);
    }
    CHECK(got.size() == want.size(), "%s has %d numbers, not %d", what, int(got.size()), int(want.size()));
    for (size_t i = 0; i < got.size(); ++i) {
      const double allowed = error() * largest + store_epsilon * std::fabs(want[i]) + store_least;
      const bool right = want[i] != want[i] ? got[i] != got[i] : std::fabs(got[i] - want[i]) <= allowed;
      CHECK(right, "%s[%d] is %.9g, not %.9g: %s", what, int(i), got[i], want[i], text().c_str());
    }
  }
  void check(const char* what, const std::vector<R>& got, const Numbers& want) {
    check_numbers(what, Numbers(got.begin(), got.end()), want);
  }
  void check(const char* what, Rows<S>& got, const Numbers& want) {
    CHECK(got.padding_is_intact(), "%s: %s", what, text().c_str());
    check_numbers(what, got.values(), want, Type<S>::epsilon, Type<S>::least);
  }

  void fill(Gated& p) {
    const auto data = [](auto& vector) { return vector.empty() ? nullptr : vector.data(); };
    p.T = c.T, p.B = c.B, p.H = c.H;
    p.cell = c.cell;
    p.dtype = Type<S>::dtype;
    p.weight_hh = weight.data();
    p.bias_hh = data(bias);
    p.ln_weight = data(ln_weight);
    p.ln_bias = data(ln_bias);
    p.ln_c_weight = data(ln_c_weight);
    p.ln_c_bias = data(ln_c_bias);
    p.h0 = data(h0);
    p.c0 = data(c0);
    p.reset = {data(reset), c.B, 1};
    p.lengths = data(lengths);
    p.starts = data(starts);
    p.reverse = c.reverse;
    p.zoneout_h = c.rate_h();
    p.zoneout_c = c.rate_c();
    p.keep_h = {data(keep_h), c.B * c.H, c.H};
    p.keep_c = {data(keep_c), c.B * c.H, c.H};
    p.threads = c.threads;
  }

  void check_forward(const Isa& isa) {
    const int64_t values = c.cell == Cell::gru ? 4 : c.G(), rows = kept_rows();
    gates = canaries<R>(rows * values * c.H);
    cells = canaries<R>(c.cell == Cell::lstm ? rows * c.H : 0);
    normed = canaries<R>(c.ln ? rows * c.G() * c.H : 0);
    rstd = canaries<R>(c.ln ? rows : 0);
    for (const bool keeps : {false, true}) {
      std::vector<R> h_n = canaries<R>(c.B * c.H), c_n = canaries<R>(c.cell == Cell::lstm ? c.B * c.H : 0);
      GatedForward p{};
      fill(p);
      output.clear();
      p.x = x.sequence();
      p.output = output.sequence();
      p.h_n = h_n.data();
      p.c_n = c_n.data();
      if (keeps) {
        p.gates = gates.data();
        p.cells = cells.data();
        p.normed = normed.data();
        p.rstd = rstd.data();
      }
      isa.take();
      RECATTN_RUN(gated_forward, p);
      check("output", output, reference.output);
      check("h_n", h_n, reference.h_n);
      if (c.cell == Cell::lstm) check("c_n", c_n, reference.c_n);
    }
    for (const std::vector<R>* kept : {&gates, &cells, &normed, &rstd}) check_past_the_ends(*kept);
  }

  // What is kept of the steps past a row's length is 0.
  void check_past_the_ends(const std::vector<R>& kept) {
    const int64_t rows = c.T * c.B, width = rows > 0 ? int64_t(kept.size()) / rows : 0;
    for (int64_t i = 0; i < rows * width && !c.packed; ++i) {
      const int64_t t = i / width / c.B, b = i / width % c.B;
      CHECK(!reference.ended(t, b) || kept[i] == 0, "kept[%d] is %.9g: %s", int(i), double(kept[i]), text().c_str());
    }
  }

  void check_backward(const Isa& isa) {
    const int64_t size = c.G() * c.H;
    GatedTensors want = reference.backward(in, output.values(), grad_output, dh_n, dc_n);
    // Nothing of output past a row's length may be read.
    output.each([&](int64_t t, int64_t b, S& v) {
      if (reference.ended(t, b)) v = canary<S>();
    });
    const bool simple = (c.cell == Cell::rnn_tanh || c.cell == Cell::rnn_relu || c.cell == Cell::lstm) && !NARROW;
    std::vector<R> grad_q = canaries<R>(simple && !c.ln && coin() ? 0 : kept_rows() * size);
    std::vector<R> grad_h0 = canaries<R>(c.B * c.H), grad_c0 = canaries<R>(c.cell == Cell::lstm ? c.B * c.H : 0);
    std::vector<R> grad_weight = canaries<R>(size * c.H), grad_bias = canaries<R>(size);
    std::vector<R> grad_ln_weight = canaries<R>(size), grad_ln_bias = canaries<R>(size);
    std::vector<R> grad_ln_c_weight = canaries<R>(c.H), grad_ln_c_bias = canaries<R>(c.H);
    const auto wanted = [&](std::vector<R>& vector) -> R* {
      if (random() % 8 == 0) vector.clear();
      return vector.empty() ? nullptr : vector.data();
    };
    dx.clear();
    GatedBackward p{};
    fill(p);
    if (c.grad_output) p.grad_output = dy.sequence();
    p.output = output.sequence();
    p.grad_x = dx.sequence();
    p.grad_h_n = grad_h_n.empty() ? nullptr : grad_h_n.data();
    p.grad_c_n = grad_c_n.empty() ? nullptr : grad_c_n.data();
    p.gates = simple && c.cell != Cell::lstm && c.zoneout == 0 && coin() ? nullptr : gates.data();
    p.cells = cells.data();
    p.normed = normed.data();
    p.rstd = rstd.data();
    p.grad_q = grad_q.empty() ? nullptr : grad_q.data();
    p.grad_clip = c.limit();
    p.grad_h0 = wanted(grad_h0);
    p.grad_c0 = wanted(grad_c0);
    p.grad_weight_hh = wanted(grad_weight);
    p.grad_bias_hh = wanted(grad_bias);
    if (c.ln) {
      p.grad_ln_weight = wanted(grad_ln_weight);
      p.grad_ln_bias = wanted(grad_ln_bias);
      p.grad_ln_c_weight = wanted(grad_ln_c_weight);
      p.grad_ln_c_bias = wanted(grad_ln_c_bias);
    }
    isa.take();
    RECATTN_RUN(gated_backward, p);
    check("grad_x", dx, want.x);
    if (p.grad_h0) check("grad_h0", grad_h0, want.h0);
    if (p.grad_c0) check("grad_c0", grad_c0, want.c0);
    if (p.grad_weight_hh) check("grad_weight_hh", grad_weight, want.weight);
    if (p.grad_bias_hh) check("grad_bias_hh", grad_bias, want.bias);
    if (p.grad_ln_weight) check("grad_ln_weight", grad_ln_weight, want.ln_weight);
    if (p.grad_ln_bias) check("grad_ln_bias", grad_ln_bias, want.ln_bias);
    if (c.cell == Cell::lstm && p.grad_ln_c_weight) check("grad_ln_c_weight", grad_ln_c_weight, want.ln_c_weight);
    if (c.cell == Cell::lstm && p.grad_ln_c_bias) check("grad_ln_c_bias", grad_ln_c_bias, want.ln_c_bias);
  }

  const GatedCase c;
  Random& random;
  std::string name;
  GatedTensors in;
  const std::vector<int64_t> lengths, starts;
  Rows<S> x, dy, output, dx;
  Numbers grad_output, dh_n, dc_n;
  std::vector<R> weight, bias, ln_weight, ln_bias, ln_c_weight, ln_c_bias, h0, c0, grad_h_n, grad_c_n;
  std::vector<R> gates, cells, normed, rstd;  // as the kernel kept them
  std::vector<uint8_t> reset, keep_h, keep_c;
  GatedReference reference;
};

// The reference's own gradients, along a random direction of all that it has gradients of.
void check_reference(const GatedCase& c, Random& random) {
  std::vector<uint8_t> reset, keep_h, keep_c;
  std::vector<int64_t> lengths;
  for (int64_t b = 0; c.lengths && b < c.B; ++b) lengths.push_back(random() % uint64_t(c.T + 1));
  for (int64_t i = 0; c.reset && i < c.T * c.B; ++i) reset.push_back(random() % 4 == 0);
  for (int64_t i = 0; c.zoneout == 1 && i < c.T * c.B * c.H; ++i) {
    keep_h.push_back(random() % 3 == 0);
    keep_c.push_back(random() % 3 == 0);
  }
  const auto draw = [&](Numbers& numbers) {
    for (double& v : numbers) v = uniform(random, -1, 1);
  };
  GatedTensors in(c), direction(c);
  for (Numbers* numbers : in.all()) draw(*numbers);
  for (Numbers* numbers : direction.all()) draw(*numbers);
  Numbers dy(c.T * c.B * c.H), dh_n(c.B * c.H), dc_n(c.cell == Cell::lstm ? c.B * c.H : 0);
  for (Numbers* numbers : {&dy, &dh_n, &dc_n}) draw(*numbers);
  dc_n.resize(c.B * c.H);
  GatedReference reference(c, reset, lengths, keep_h, keep_c);
  const auto loss = [&](double step) {
    GatedTensors moved = in;
    for (size_t i = 0; i < in.all().size(); ++i) {
      for (size_t k = 0; k < in.all()[i]->size(); ++k) (*moved.all()[i])[k] += step * (*direction.all()[i])[k];
    }
    reference.forward(moved);
    double sum = 0;
    for (size_t i = 0; i < dy.size(); ++i) sum += dy[i] * reference.output[i];
    for (size_t i = 0; i < dh_n.size(); ++i) sum += dh_n[i] * reference.h_n[i] + dc_n[i] * reference.c_n[i];
    return sum;
  };
  const double step = 1e-5, difference = (loss(step) - loss(-step)) / (2 * step);
  reference.forward(in);
  GatedTensors grads = reference.backward(in, reference.output, dy, dh_n, dc_n);
  double along = 0;
  for (size_t i = 0; i < grads.all().size(); ++i) {
    for (size_t k = 0; k < grads.all()[i]->size(); ++k) along += (*grads.all()[i])[k] * (*direction.all()[i])[k];
  }
  CHECK(std::fabs(along - difference) <= 1e-6 * (1 + std::fabs(along)), "cell %d: along %.9g, by differences %.9g",
        int(c.cell), along, difference);
}

struct Sizes {
  int64_t T, B, H;
};

void run(const std::vector<Isa>& isas, const GatedCase& c, Dtype dtype, Random& random) {
  switch (dtype) {
    case Dtype::float32: return GatedTest<float>(c, random).run(isas);
    case Dtype::float64: return GatedTest<double>(c, random).run(isas);
    case Dtype::bfloat16: return GatedTest<Bf16>(c, random).run(isas);
    case Dtype::float16: return GatedTest<F16>(c, random).run(isas);
  }
}

}  // namespace

int test_gated(const std::vector<Isa>& isas) {
  constexpr Dtype dtypes[] = {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16};
  Random random(0);
  int cases = 0;

  // The options are drawn: every pair of them meets many times over, also in each type.
  const auto options = [&](int64_t T, int64_t B, int64_t H, int cell) {
    GatedCase c{};
    c.T = T, c.B = B, c.H = H;
    c.cell = Cell(cell);
    for (bool* option : {&c.bias, &c.ln, &c.h0, &c.c0, &c.reset, &c.lengths, &c.reverse, &c.clip, &c.grad_output,
                         &c.grad_h_n, &c.grad_c_n}) {
      *option = random() % 2 == 0;
    }
    if (c.cell == Cell::gru_before) c.ln = false;
    c.packed = c.lengths && random() % 2 == 0;
    c.nan = random() % 8 == 0;
    c.coarse = random() % 2 == 0;
    c.zoneout = int(random() % 3);
    c.threads = 1 + int(random() % 3);
    return c;
  };
  for (int cell = 0; cell < 5; ++cell) {
    for (int i = 0; i < 24; ++i) {
      GatedCase c = options(4, 3, 5, cell);
      c.clip = false;
      check_reference(c, random);
    }
  }
  for (const Dtype dtype : dtypes) {
    for (int cell = 0; cell < 5; ++cell) {
      for (const int64_t H : {1, 5, 17, 33, 65}) {
        for (const int64_t B : {1, 3, 13}) {
          for (const int64_t T : {0, 1, 7}) {
            run(isas, options(T, B, H, cell), dtype, random);
            ++cases;
          }
        }
      }
      // No row; weights that are not packed; more rows than a block of them, divided over threads; more steps, and more
      // terms of a sum, than a block; enough of both for tiles.
      for (const auto& [T, B, H] : {Sizes{3, 0, 5}, {1, 1, 64}, {1, 3, 128}, {2, 70, 34}, {45, 7, 20}, {1, 2, 530},
                                    {3, 41, 100}, {5, 9, 350}}) {
        if (H > 300 && (cell > 2 || dtype == Dtype::bfloat16)) continue;
        run(isas, options(T, B, H, cell), dtype, random);
        ++cases;
      }
    }
  }
  std::printf("gated: %d cases on each instruction set: %d failed checks\n", cases, failures);
  return failures;
}

}  // namespace recattn
