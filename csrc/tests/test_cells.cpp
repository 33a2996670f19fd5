// csrc/cells.h and csrc/cpu/numeric.h, as compiled for one instruction set. The sign of a zero is not looked at, except
// in the conversions: nothing downstream depends on it.
#include <cfloat>
#include <limits>

#include "../cpu/numeric.h"
#include "reference.h"

namespace recattn {
namespace RECATTN_ISA {

int test_cells();

namespace {

constexpr double SLOPE = 0.125;  // exact in every type

double ulp(double v, int mantissa_bits, int least_exponent) {
  const int exponent = v == 0 ? least_exponent : std::ilogb(v);
  return std::ldexp(1.0, (exponent < least_exponent ? least_exponent : exponent) - mantissa_bits);
}
double ulp(float, double exact) { return ulp(exact, FLT_MANT_DIG - 1, FLT_MIN_EXP - 1); }
double ulp(double, double exact) { return ulp(exact, DBL_MANT_DIG - 1, DBL_MIN_EXP - 1); }

// Whether value is exact to within an error; both NaN is equal, and so is infinity where exact overflows.
template <class R>
bool near(R value, double exact, double error) {
  if (exact != exact) return value != value;
  if (std::fabs(R(exact)) == R(INFINITY)) return value == R(exact);
  return std::fabs(double(value) - exact) <= error;
}

// Calls f with 2 million floats: every 2011th bit pattern (zeros, subnormals, infinities and NaNs of either sign among
// them), each number of steps of 2^-14 in [-8, 8], and the neighbourhoods of the kinks.
template <class F>
void for_floats(F f) {
  for (uint64_t bits = 0; bits < uint64_t(1) << 32; bits += 2011) f(bits_to_float(uint32_t(bits)));
  for (int i = -(8 << 14); i <= 8 << 14; ++i) f(std::ldexp(float(i), -14));
  for (const uint32_t sign : {0u, 0x80000000u}) {
    for (const float kink : {0.0f, FLT_MIN, 0.35f, 1.0f, 6.0f, 87.0f, 89.0f, FLT_MAX}) {
      const uint32_t bits = float_to_bits(kink);
      for (uint32_t i = 0; i <= 64; ++i) f(bits_to_float(sign | (bits + i)));
      for (uint32_t i = 1; i <= 64 && i <= bits; ++i) f(bits_to_float(sign | (bits - i)));
    }
    f(bits_to_float(sign | 0x7f800000u));
    f(bits_to_float(sign | 0x7fc00000u));
  }
}

double derivative_of_v(Activation a, double v) {
  const bool curved = a == Activation::tanh || a == Activation::sigmoid;
  const double e = curved ? std::exp(-std::fabs(v)) : NAN;
  switch (a) {
    case Activation::relu: return v > 0;
    case Activation::tanh: return 4 * e * e / ((1 + e * e) * (1 + e * e));
    case Activation::sigmoid: return e / ((1 + e) * (1 + e));
    case Activation::identity: return 1;
    case Activation::leaky_relu: return v > 0 ? 1 : SLOPE;
    case Activation::relu6: return v > 0 && v < 6;
    case Activation::hardtanh: return v > -1 && v < 1;
  }
  return NAN;
}

template <Activation A, class R>
void check_activation(R v) {
  const R slope = R(SLOPE), h = activate<A>(v, slope);
  const double exact = act(A, v, SLOPE), epsilon = std::numeric_limits<R>::epsilon();
  // float32's sigmoid is 0 where its exp overflows, for v < -88.376, where the exact one is at most 4.2e-39.
  const double floor = A == Activation::sigmoid && sizeof(R) == 4 ? FLT_MIN / 2 : 0.0;
  const double ulps = act_ulps(A), allowed = ulps > 0 ? std::fmax(ulps * ulp(v, exact), floor) : 0.0;
  CHECK(near(h, exact, allowed), "activation %d of %a is %a, not %a", int(A), double(v), double(h), exact);

  // Of the values that are some activation's, among them every v in [-1, 1].
  const double derived = act_derivative(A, h, SLOPE);
  CHECK(near(derivative<A>(h, slope), derived, derivative_epsilons(A) * epsilon),
        "derivative %d at h = %a is %a, not %a", int(A), double(h), double(derivative<A>(h, slope)), derived);
  // The error of h comes on top: 3 ulps of at most half an epsilon, times 2h for tanh and 1 - 2h for sigmoid.
  const double error = derivative_epsilons(A) > 0 ? (derivative_epsilons(A) + 3.0) * epsilon : 0.0;
  if (v == v) {
    CHECK(near(derivative<A>(h, slope), derivative_of_v(A, v), error), "derivative %d of v = %a is %a, not %a", int(A),
          double(v), double(derivative<A>(h, slope)), derivative_of_v(A, v));
  }
}

template <Activation A>
void check_activation() {
  for_floats([](float v) {
    check_activation<A>(v);
    check_activation<A>(double(v));
    check_activation<A>(v * (1.0 + 0x1p-30));  // a double that is no float
  });
  for (const double v : {DBL_TRUE_MIN, DBL_MIN, DBL_MAX, 708.5, 745.5}) {
    check_activation<A>(v);
    check_activation<A>(-v);
  }
}

void check_exp() {
  for_floats([](float x) {
    const float e = exp_(x);
    const double exact = std::exp(double(x));
    if (x != x) {
      CHECK(e != e, "exp_(NaN) is %a", double(e));
    } else if (x < -87) {
      CHECK(e >= 1e-38f && e < 2e-38f, "exp_(%a) is %a", double(x), double(e));
    } else if (x > 88.3f) {
      CHECK(e == INFINITY || near(e, exact, 1.5 * ulp(e, exact)), "exp_(%a) is %a", double(x), double(e));
      CHECK(e == INFINITY || x < 88.4f, "exp_(%a) is %a", double(x), double(e));
    } else {
      CHECK(near(e, exact, 1.5 * ulp(e, exact)), "exp_(%a) is %a, not %a", double(x), double(e), exact);
    }
  });
}

template <class R>
void check_clamp() {
  const R values[] = {R(0), R(0.25), R(1), R(1.5), R(100), R(INFINITY)};
  for (const R limit : values) {
    for (const R v : values) {
      const R least = v < limit ? v : limit;
      CHECK(clamp_symmetric(v, limit) == least, "clamp_symmetric(%g, %g)", double(v), double(limit));
      CHECK(clamp_symmetric(-v, limit) == -least, "clamp_symmetric(-%g, %g)", double(v), double(limit));
    }
    const R of_nan = clamp_symmetric(R(NAN), limit);
    CHECK(of_nan != of_nan, "clamp_symmetric(NaN, %g) is %g", double(limit), double(of_nan));
  }
}

bool same(double a, double b) { return a != a ? b != b : a == b && std::signbit(a) == std::signbit(b); }

template <class S>
uint16_t stored(float v) {
  S to;
  store(&to, v);
  return to.bits;
}

template <class S>
void check_rounding(Format format, float v) {
  const double exact = rounded(v, format), got = decode(stored<S>(v), format);
  CHECK(same(exact, got), "%a is stored as %a, not %a", double(v), got, exact);
}

template <class S>
void check_conversions(Format format) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const uint16_t bits = uint16_t(i);
    const float value = load(S{{}, bits});
    const double exact = decode(bits, format);
    CHECK(same(value, exact), "pattern %04x is loaded as %a, not %a", i, double(value), exact);
    const uint16_t back = stored<S>(value);
    const bool kept = exact != exact ? same(decode(back, format), exact) : back == bits;
    CHECK(kept, "pattern %04x comes back as %04x", i, back);
    // Half way to the next number of the type is where ties and the directions around them are decided.
    const float half = float(0.5 * (exact + decode(uint16_t(i + 1), format)));
    for (int step = -2; step <= 2; ++step) {
      check_rounding<S>(format, bits_to_float(float_to_bits(half) + uint32_t(step)));
    }
  }
  for_floats([&](float v) { check_rounding<S>(format, v); });
}

// Rows at once are converted as single numbers are, wherever in a row a number lies.
template <class S>
void check_rows(Format format) {
  for (const int64_t n : {0, 1, 7, 8, 15, 31, 33, 65529}) {
    std::vector<S> from(n), back(n);
    std::vector<float> wide(n);
    for (int64_t i = 0; i < n; ++i) from[i].bits = uint16_t(i * 31);
    widen(wide.data(), from.data(), n);
    for (int64_t i = 0; i < n; ++i) {
      CHECK(same(wide[i], load(from[i])), "pattern %04x is widened to %a", from[i].bits, double(wide[i]));
    }
    for (int64_t i = 0; i < n; ++i) wide[i] = bits_to_float(uint32_t(i) * 0x10ffffu);  // steps of all exponents
    narrow(back.data(), wide.data(), n);
    for (int64_t i = 0; i < n; ++i) {
      const double got = decode(back[i].bits, format), one = decode(stored<S>(wide[i]), format);
      CHECK(same(got, one), "%a in a row is stored as %a, not %a", double(wide[i]), got, one);
    }
  }
}

// h as rounding alone would store it, but never on a bound of the activation that h itself is not on: there it is the
// neighbour of the bound. Below least, rounding to the type's own subnormals would do too. exact is h as rounded.
template <Activation A, class S>
void check_state(Format format, double low, double high, float least, float h, double exact) {
  if (!(h >= float(low) && h <= float(high)) && h == h) return;  // not a value of this activation
  S to;
  store(&to, keep_inside<A, S>(h));
  const double got = decode(to.bits, format);
  if (h != h) {
    CHECK(got != got, "activation %d: NaN is stored as %a", int(A), got);
    return;
  }
  const auto step_down = [&](double bound) {  // the number of the type next to bound > 0, towards 0
    return bound - std::ldexp(1.0, std::ilogb(std::nextafter(bound, 0.0)) - format.mantissa_bits());
  };
  const bool kink_at_zero = A == Activation::relu || A == Activation::leaky_relu || A == Activation::relu6;
  if (kink_at_zero && h > 0 && h < least) exact = rounded(least, format);
  if (h < high && exact >= high) exact = step_down(high);
  if (h > low && exact <= low && low < 0) exact = -step_down(-low);
  CHECK(got == exact, "activation %d: h = %a is stored as %a, not %a", int(A), double(h), got, exact);
  if (kink_at_zero && h > 0) CHECK(got > 0, "activation %d: h = %a is stored as %a", int(A), double(h), got);
  const double slope = SLOPE, from_h = act_derivative(A, h, slope), from_stored = derivative<A>(load(to), float(slope));
  if (A != Activation::tanh && A != Activation::sigmoid) {
    CHECK(from_h == from_stored, "activation %d: the derivative at h = %a becomes %g", int(A), double(h), from_stored);
  }
}

template <class S>
void check_states(Format format) {
  const float least = S::smallest();
  const auto check = [&](float h) {
    const double exact = rounded(h, format);
    check_state<Activation::relu, S>(format, 0.0, INFINITY, least, h, exact);
    check_state<Activation::tanh, S>(format, -INFINITY, INFINITY, least, h, exact);
    check_state<Activation::sigmoid, S>(format, -INFINITY, INFINITY, least, h, exact);
    check_state<Activation::identity, S>(format, -INFINITY, INFINITY, least, h, exact);
    check_state<Activation::leaky_relu, S>(format, -INFINITY, INFINITY, least, h, exact);
    check_state<Activation::relu6, S>(format, 0.0, 6.0, least, h, exact);
    check_state<Activation::hardtanh, S>(format, -1.0, 1.0, least, h, exact);
  };
  for_floats(check);
  // Every float from two numbers of bfloat16 below a bound to the bound, and around the least positive numbers.
  for (const float bound : {1.0f, 6.0f, least, 2 * least}) {
    for (uint32_t i = 0; i < 3u << 16; ++i) {
      check(bits_to_float(float_to_bits(bound) - i));
      check(-bits_to_float(float_to_bits(bound) - i));
    }
  }
}

}  // namespace

int test_cells() {
  check_exp();
  check_activation<Activation::relu>();
  check_activation<Activation::tanh>();
  check_activation<Activation::sigmoid>();
  check_activation<Activation::identity>();
  check_activation<Activation::leaky_relu>();
  check_activation<Activation::relu6>();
  check_activation<Activation::hardtanh>();
  check_clamp<float>();
  check_clamp<double>();
  check_conversions<BFloat16>(BFLOAT16);
  check_conversions<Float16>(FLOAT16);
  check_rows<BFloat16>(BFLOAT16);
  check_rows<Float16>(FLOAT16);
  check_states<BFloat16>(BFLOAT16);
  check_states<Float16>(FLOAT16);
  return failures;
}

}  // namespace RECATTN_ISA
}  // namespace recattn
