// What the tests hold csrc to, written from the definitions in double precision and sharing no code with csrc.
#pragma once

#include <cmath>

#include "check.h"

namespace recattn {
namespace {

// Half of the sequences' types: 1 sign bit, exponent_bits, the rest mantissa.
struct Format {
  int exponent_bits;
  constexpr int mantissa_bits() const { return 15 - exponent_bits; }
  constexpr int bias() const { return (1 << (exponent_bits - 1)) - 1; }
};
[[maybe_unused]] constexpr Format BFLOAT16 = {8}, FLOAT16 = {5};

[[maybe_unused]] double decode(uint16_t bits, Format format) {
  const int mantissa_bits = format.mantissa_bits(), ones = (1 << format.exponent_bits) - 1;
  const int exponent = (bits >> mantissa_bits) & ones, mantissa = bits & ((1 << mantissa_bits) - 1);
  const int implicit = exponent ? 1 << mantissa_bits : 0, scale = (exponent ? exponent : 1) - format.bias();
  double magnitude = std::ldexp(double(implicit + mantissa), scale - mantissa_bits);
  if (exponent == ones) magnitude = mantissa ? NAN : INFINITY;
  return std::copysign(magnitude, bits & 0x8000 ? -1.0 : 1.0);
}

// v rounded to the nearest number of a format, ties to even, as nearbyint rounds to an integer.
[[maybe_unused]] double rounded(double v, Format format) {
  if (v == 0 || v != v || std::fabs(v) == INFINITY) return v;
  int exponent = std::ilogb(v);
  if (exponent < 1 - format.bias()) exponent = 1 - format.bias();  // subnormals have the spacing of the least normals
  const int spacing = exponent - format.mantissa_bits();
  const double nearest = std::ldexp(std::nearbyint(std::ldexp(v, -spacing)), spacing);
  return std::fabs(nearest) >= std::ldexp(2.0, format.bias()) ? std::copysign(INFINITY, v) : nearest;
}

[[maybe_unused]] double act(Activation a, double v, double slope) {
  if (v != v) return v;
  switch (a) {
    case Activation::relu: return std::fmax(v, 0.0);
    case Activation::tanh: return std::tanh(v);
    case Activation::sigmoid: return 1.0 / (1.0 + std::exp(-v));
    case Activation::identity: return v;
    case Activation::leaky_relu: return v > 0 ? v : slope * v;
    case Activation::relu6: return std::fmin(std::fmax(v, 0.0), 6.0);
    case Activation::hardtanh: return std::fmin(std::fmax(v, -1.0), 1.0);
  }
  return NAN;
}

// act'(v) where act(v) = h. At a kink, and for NaN, the value is the one that torch takes.
[[maybe_unused]] double act_derivative(Activation a, double h, double slope) {
  switch (a) {
    case Activation::relu: return h <= 0 ? 0.0 : 1.0;
    case Activation::tanh: return (1.0 - h) * (1.0 + h);
    case Activation::sigmoid: return h * (1.0 - h);
    case Activation::identity: return 1.0;
    case Activation::leaky_relu: return h > 0 ? 1.0 : slope;
    case Activation::relu6: return h <= 0 || h >= 6 ? 0.0 : 1.0;
    case Activation::hardtanh: return h <= -1 || h >= 1 ? 0.0 : 1.0;
  }
  return NAN;
}

// What such a derivative of 0 makes of any gradient, infinite and NaN ones too: 0 if it is a mask's.
[[maybe_unused]] bool masks(Activation a) {
  return a == Activation::relu || a == Activation::relu6 || a == Activation::hardtanh;
}

// The error allowed to an activation, in units in the last place (ulp) of its exact value. leaky_relu rounds one
// product: half an ulp. In float32 the largest errors measured, on every 37th float, are 2.43 for sigmoid and 2.07 for
// tanh (exp_: 1.20). In float64 both are libm's, whose errors are below 1 ulp.
[[maybe_unused]] double act_ulps(Activation a) {
  if (a == Activation::tanh || a == Activation::sigmoid) return 3.0;
  return a == Activation::leaky_relu ? 0.5 : 0.0;
}

// The error allowed to act' at a given h, in units of the type's epsilon: 1 - h * h rounds twice, each time by at most
// half of the spacing below 1, which is half of epsilon. h * (1 - h) is at most a quarter, and so is its error.
[[maybe_unused]] double derivative_epsilons(Activation a) {
  if (a == Activation::tanh) return 0.5;
  return a == Activation::sigmoid ? 0.25 : 0.0;
}

}  // namespace
}  // namespace recattn
