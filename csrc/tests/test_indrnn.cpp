// csrc/cpu/indrnn.cpp against a loop in double precision over h[t] = act(x[t] + bias + u * h[t-1]) and its derivative.
// Outputs, the padding between rows, and the steps past a row's length, which a kernel may not read, are canaries.
#include <array>
#include <limits>
#include <string>
#include <utility>

#include "sequences.h"

namespace recattn {
namespace {

// A number of the loop, and how far the kernel's may be from it: no tolerance is tuned, each follows from the
// operations that led there. A sum or product adds one epsilon of R times its magnitude to the errors that its operands
// bring: half of it is the kernel's rounding, half the loop's own where R is double, second-order terms where R is
// float.
template <class R>
struct Bounded {
  static constexpr double epsilon = std::numeric_limits<R>::epsilon();
  static constexpr double least = std::numeric_limits<R>::denorm_min();  // the error of a product that underflows
  double value = 0, error = 0;

  bool admits(double v, double store_epsilon = 0, double store_least = 0) const {
    if (value != value) return v != v;
    return std::fabs(v - value) <= error + store_epsilon * std::fabs(value) + store_least;
  }
  friend Bounded operator+(Bounded a, Bounded b) {
    const double sum = a.value + b.value;
    return {sum, a.error + b.error + epsilon * std::fabs(sum)};
  }
  friend Bounded operator*(Bounded a, Bounded b) {
    const double product = a.value * b.value;
    const double carried = std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error;
    return {product, carried + epsilon * std::fabs(product) + least};
  }
};

struct Case {
  int64_t T, B, H;
  Activation activation;
  bool bias, h0, reset, lengths, reverse, clip, grad_output, grad_h_n, nan;
  Layout in, out;
  int64_t padding;
  int threads;

  double slope() const { return 0.125; }  // exact in float, as is 0.25
  double limit() const { return clip ? 0.25 : INFINITY; }

  std::string text(const Isa& isa, const char* dtype) const {
    const auto number = [](int64_t n) { return " " + std::to_string(n); };
    std::string words = std::string(isa.name) + " " + dtype + ", activation" + number(int(activation)) + ", T B H" +
                        number(T) + number(B) + number(H) + ", layouts" + number(int(in)) + number(int(out)) +
                        ", threads" + number(threads);
    const std::pair<bool, const char*> options[] = {
        {bias, ", bias"}, {h0, ", h0"}, {reset, ", reset"}, {lengths, ", lengths"}, {reverse, ", reverse"},
        {clip, ", clip"}, {nan, ", NaN"}, {grad_output, ", grad_output"}, {grad_h_n, ", grad_h_n"}};
    for (const auto& [on, name] : options) words += on ? name : "";
    return words;
  }
};

template <class S>
class Test {
  using R = typename Type<S>::R;
  using Number = Bounded<R>;

 public:
  Test(const Case& c, Random& random, const char* dtype)
      : c(c), dtype(dtype), x(rows(c.in)), dy(rows(c.in)), output(rows(c.out)), u(c.H), bias(c.bias ? c.H : 0),
        h0(c.h0 ? c.B * c.H : 0), dh_n(c.grad_h_n ? c.B * c.H : 0), reset(c.reset ? c.T * c.B : 0),
        lengths(c.lengths ? c.B : 0), exact(c.T * c.B * c.H), exact_state(c.B * c.H) {
    for (Buffer<R>* vector : {&u, &bias, &h0, &dh_n}) {
      for (int64_t i = 0; i < vector->size; ++i) (*vector)[i] = R(uniform(random, -1, 1));
    }
    for (int64_t i = 0; i < reset.size; ++i) reset[i] = random() % 4 == 0;
    for (int64_t i = 0, kind = random() % 3; i < lengths.size; ++i, ++kind) {
      lengths[i] = kind % 3 == 0 ? 0 : kind % 3 == 1 ? c.T : int64_t(random() % uint64_t(c.T + 1));
    }
    for (int64_t t = 0; t < c.T; ++t) {
      for (int64_t b = 0; b < c.B; ++b) {
        if (c.in != Layout::expanded && ended(t, b)) continue;
        for (int64_t h = 0; h < c.H; ++h) {
          x.at(t, b, h) = Type<S>::draw(random, 1);
          dy.at(t, b, h) = Type<S>::draw(random, 1);
        }
      }
    }
    if (c.nan && c.T * c.B * c.H > 0) {
      x.at(c.T / 2, c.B / 2, c.H / 2) = canary<S>();
      dy.at(c.T / 2, 0, 0) = canary<S>();
    }
  }

  void run(const std::vector<Isa>& isas) {
    forward_exactly();
    for (const Isa& isa : isas) check_forward(isa);
    // The gradient is that of one output, whatever the instruction set: the last one's.
    for_columns([&](int64_t b, int64_t h) {
      for (int64_t t = 0; t < c.T; ++t) {
        if (ended(t, b)) output.at(t, b, h) = canary<S>();
      }
    });
    backward_exactly();
    for (const Isa& isa : isas) check_backward(isa);
  }

 private:
  // Storing a state rounds it, and keep_inside moves it by less than the spacing below the bound, which costs as much
  // again; Type::least is what keep_inside makes of a smaller state.
  static constexpr double STORE_EPSILON = 2 * Type<S>::epsilon;

  Rows<S> rows(Layout layout) const { return {c.T, c.B, c.H, layout, c.padding}; }
  bool ended(int64_t t, int64_t b) { return lengths.data && t >= lengths[b]; }
  int64_t reset_stride_t() const { return c.in == Layout::batch_first ? 1 : c.B; }
  int64_t reset_stride_b() const { return c.in == Layout::batch_first ? c.T : 1; }
  bool resets(int64_t t, int64_t b) { return reset.data && reset[t * reset_stride_t() + b * reset_stride_b()]; }
  int64_t index(int64_t t, int64_t b, int64_t h) const { return (t * c.B + b) * c.H + h; }

  template <class F>
  void for_columns(F f) {
    for (int64_t b = 0; b < c.B; ++b) {
      for (int64_t h = 0; h < c.H; ++h) f(b, h);
    }
  }

  Number act_of(Number v) {
    const double h = act(c.activation, v.value, c.slope());  // its slope is at most 1
    return {h, v.error + act_ulps(c.activation) * Number::epsilon * std::fabs(h) + Number::least};
  }

  Number derivative_at(double h) {
    const double d = act_derivative(c.activation, h, c.slope()), kernel = derivative_epsilons(c.activation);
    return {d, kernel > 0 ? (kernel + std::fabs(d)) * Number::epsilon : 0.0};  // |d|: the loop's own roundings
  }

  void forward_exactly() {
    for_columns([&](int64_t b, int64_t h) {
      Number state = {h0.data ? double(h0[b * c.H + h]) : 0.0, 0};
      for (int64_t step = 0; step < c.T; ++step) {
        const int64_t t = c.reverse ? c.T - 1 - step : step;
        if (ended(t, b)) continue;  // exact stays 0
        if (resets(t, b)) state = {};
        Number v = {x.value(t, b, h), 0};
        if (bias.data) v = v + Number{double(bias[h]), 0};
        state = act_of(v + Number{double(u[h]), 0} * state);
        exact[index(t, b, h)] = state;
      }
      exact_state[b * c.H + h] = state;
    });
  }

  // From the last step to the first:
  // g = clip(dy + flow) * act'(h);  dx = g;  du += g * h[t-1];  db += g;  flow = u * g.
  void backward_exactly() {
    exact_du.assign(c.H, {});
    exact_db.assign(c.H, {});
    exact.assign(exact.size(), {});
    for_columns([&](int64_t b, int64_t h) {
      Number flow = {dh_n.data ? double(dh_n[b * c.H + h]) : 0.0, 0}, du, db;
      for (int64_t step = c.T - 1; step >= 0; --step) {
        const int64_t t = c.reverse ? c.T - 1 - step : step, before = c.reverse ? t + 1 : t - 1;
        if (ended(t, b)) continue;
        const bool first = before < 0 || before >= c.T || ended(before, b);
        Number g = c.grad_output ? flow + Number{dy.value(t, b, h), 0} : flow;
        if (g.value > c.limit()) g.value = c.limit();
        if (g.value < -c.limit()) g.value = -c.limit();
        const Number d = derivative_at(output.value(t, b, h));
        g = masks(c.activation) && d.value == 0 ? Number() : g * d;
        exact[index(t, b, h)] = g;
        double prev = 0.0;  // not nothing where there is no state: 0 times NaN is NaN
        if (!resets(t, b) && !first) prev = output.value(before, b, h);
        if (!resets(t, b) && first && h0.data) prev = h0[b * c.H + h];
        du = du + g * Number{prev, 0};
        db = db + g;
        flow = resets(t, b) ? Number() : Number{double(u[h]), 0} * g;
      }
      exact_state[b * c.H + h] = flow;
      exact_du[h] = exact_du[h] + du;
      exact_db[h] = exact_db[h] + db;
    });
  }

  void fill(Indrnn& p) {
    p.T = c.T, p.B = c.B, p.H = c.H;
    p.dtype = Type<S>::dtype;
    p.activation = c.activation;
    p.negative_slope = c.slope();
    p.weight_hh = u.data;
    p.h0 = h0.data;
    p.reset = {reset.data, reset_stride_t(), reset_stride_b()};
    p.lengths = lengths.data;
    p.reverse = c.reverse;
    p.threads = c.threads;
  }

  void check_rows(const Isa& isa, const char* name, Rows<S>& rows) {
    CHECK(rows.padding_is_intact(), "%s: %s", name, c.text(isa, dtype).c_str());
    for_columns([&](int64_t b, int64_t h) {
      for (int64_t t = 0; t < c.T; ++t) {
        const Number want = exact[index(t, b, h)];
        const double got = rows.value(t, b, h);
        const bool right = ended(t, b) ? got == 0 : want.admits(got, STORE_EPSILON, Type<S>::least);
        CHECK(right, "%s[%d, %d, %d] is %.17g, not %.17g to within %.3g: %s", name, int(t), int(b), int(h), got,
              want.value, want.error, c.text(isa, dtype).c_str());
      }
    });
  }

  void check_vector(const Isa& isa, const char* name, Buffer<R>& vector, const std::vector<Number>& want) {
    for (int64_t i = 0; i < vector.size; ++i) {
      CHECK(want[i].admits(vector[i]), "%s[%d] is %.17g, not %.17g to within %.3g: %s", name, int(i),
            double(vector[i]), want[i].value, want[i].error, c.text(isa, dtype).c_str());
    }
  }

  void check_forward(const Isa& isa) {
    Canaries<R> h_n(c.B * c.H);
    IndrnnForward p{};
    fill(p);
    p.bias = bias.data;
    p.x = x.sequence();
    p.output = output.sequence();
    p.h_n = h_n.data;
    for_columns([&](int64_t b, int64_t h) {
      for (int64_t t = 0; t < c.T; ++t) output.at(t, b, h) = canary<S>();
    });
    isa.take();
    RECATTN_RUN(indrnn_forward, p);
    check_rows(isa, "output", output);
    check_vector(isa, "h_n", h_n, exact_state);
  }

  void check_backward(const Isa& isa) {
    Rows<S> dx = rows(c.out);
    Canaries<R> dh0(c.B * c.H), columns(6 * c.B * c.H), du(c.H), db(c.H);
    IndrnnBackward p{};
    fill(p);
    if (c.grad_output) p.grad_output = dy.sequence();
    p.output = output.sequence();
    p.grad_x = dx.sequence();
    p.grad_h_n = dh_n.data;
    p.grad_h0 = dh0.data;
    p.grad_columns = columns.data;
    p.grad_weight_hh = du.data;
    p.grad_bias = db.data;
    p.grad_clip = c.limit();
    isa.take();
    RECATTN_RUN(indrnn_backward, p);
    check_rows(isa, "grad_x", dx);
    check_vector(isa, "grad_h0", dh0, exact_state);
    check_vector(isa, "grad_weight_hh", du, exact_du);
    check_vector(isa, "grad_bias", db, exact_db);
  }

  const Case c;
  const char* const dtype;
  Rows<S> x, dy, output;
  Buffer<R> u, bias, h0, dh_n;
  Buffer<uint8_t> reset;
  Buffer<int64_t> lengths;
  std::vector<Number> exact, exact_state, exact_du, exact_db;  // of the forward, then of the backward
};

void run(const std::vector<Isa>& isas, const Case& c, Dtype dtype, Random& random) {
  switch (dtype) {
    case Dtype::float32: return Test<float>(c, random, "float32").run(isas);
    case Dtype::float64: return Test<double>(c, random, "float64").run(isas);
    case Dtype::bfloat16: return Test<Bf16>(c, random, "bfloat16").run(isas);
    case Dtype::float16: return Test<F16>(c, random, "float16").run(isas);
  }
}

}  // namespace

int test_indrnn(const std::vector<Isa>& isas) {
  constexpr Dtype dtypes[] = {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16};
  Random random(0);
  int cases = 0;

  // The options are drawn: every pair of them meets many times over, also in each type.
  const auto options = [&](int64_t T, int64_t B, int64_t H, int activation) {
    const auto coin = [&] { return random() % 2 == 0; };
    Case c{};
    c.T = T, c.B = B, c.H = H;
    c.activation = Activation(activation);
    for (bool* option : {&c.bias, &c.h0, &c.reset, &c.lengths, &c.reverse, &c.clip, &c.grad_output, &c.grad_h_n}) {
      *option = coin();
    }
    c.nan = random() % 8 == 0;
    c.in = Layout(random() % 4);
    c.out = Layout(random() % 3);
    c.padding = coin() ? 3 : 64;
    c.threads = coin() ? 1 : 3;
    return c;
  };
  for (const Dtype dtype : dtypes) {
    for (int activation = 0; activation < 7; ++activation) {
      for (const int64_t T : {0, 1, 2, 5, 130}) {
        for (const int64_t B : {0, 1, 3}) {
          for (const int64_t H : {0, 1, 7, 65, 130, 2100}) {  // the tile has 2048
            if (T * H > 130 * 130 && (B > 1 || activation > 1)) continue;  // slow, and no other branches
            run(isas, options(T, B, H, activation), dtype, random);
            ++cases;
          }
        }
      }
    }
    // Tiles of many rows, and sums over the rows that go to threads.
    for (const auto& [T, B, H] : {std::array{5, 700, 7}, std::array{2, 33, 2100}, std::array{130, 3, 130}}) {
      Case c = options(T, B, H, int(random() % 7));
      c.threads = 3;
      run(isas, c, dtype, random);
      ++cases;
    }
    // 8 MiB or more go past the caches where rows and padding are whole lines of the cache.
    const int64_t element = dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2, H = 160;
    Case c = options((int64_t(8) << 20) / (3 * H * element) + 1, 3, H, int(Activation::relu));
    c.out = Layout(int(dtype) % 3);
    c.padding = 64;
    c.threads = 3;
    run(isas, c, dtype, random);
    ++cases;
  }
  std::printf("indrnn: %d cases on each instruction set: %d failed checks\n", cases, failures);
  return failures;
}

}  // namespace recattn
