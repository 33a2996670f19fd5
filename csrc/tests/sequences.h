// What the tests of the recurrences draw and give to the kernels: numbers of the sequences' types, and tensors.
//
// Every tensor is an allocation of its own and of its exact size, so that AddressSanitizer sees an access one element
// past it. What a kernel is to write, and the padding between rows, begin as a NaN of a certain pattern: what a kernel
// leaves out does not compare equal, what it may not write keeps the pattern.
#pragma once

#include <new>
#include <random>
#include <vector>

#include "reference.h"

namespace recattn {
namespace {

using Random = std::mt19937_64;

double uniform(Random& random, double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random);
}

// The tests' own 16-bit types: nothing of numeric.h is trusted here.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// R: what S is computed in. Rounding v to S costs at most epsilon * |v| + least. draw(): a number below 2^exponent in
// magnitude.
template <class S> struct Type {
  using R = S;
  static constexpr Dtype dtype = sizeof(S) == 4 ? Dtype::float32 : Dtype::float64;
  static constexpr double epsilon = 0, least = 0;
  static double value(S v) { return v; }
  static S draw(Random& random, int exponent) { return S(std::ldexp(uniform(random, -1, 1), exponent)); }
};
template <> struct Type<Bf16> {
  using R = float;
  static constexpr Dtype dtype = Dtype::bfloat16;
  static constexpr double epsilon = 0x1p-8, least = 1e-38;
  static double value(Bf16 v) { return decode(v.bits, BFLOAT16); }
  // Any sign and mantissa, and one of the seven highest exponents.
  static Bf16 draw(Random& random, int exponent) {
    return {uint16_t((random() & 0x807f) | (120 + exponent + random() % 7) << 7)};
  }
};
template <> struct Type<F16> {
  using R = float;
  static constexpr Dtype dtype = Dtype::float16;
  static constexpr double epsilon = 0x1p-11, least = 0x1p-24;
  static double value(F16 v) { return decode(v.bits, FLOAT16); }
  static F16 draw(Random& random, int exponent) {
    return {uint16_t((random() & 0x83ff) | (8 + exponent + random() % 7) << 10)};
  }
};

// All bits set is a NaN in every type, and not the one that arithmetic makes.
template <class S>
S canary() {
  S v;
  memset(&v, 0xff, sizeof v);
  return v;
}

template <class T>
class Buffer {
 public:
  // Aligned as torch aligns, which is what stores past the caches ask for. Null where there is nothing, as in torch.
  explicit Buffer(int64_t n) : size(n), data(n > 0 ? new (std::align_val_t(64)) T[n] : nullptr) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { operator delete[](data, std::align_val_t(64)); }
  T& operator[](int64_t i) { return data[i]; }

  const int64_t size;
  T* const data;
};

template <class T>
struct Canaries : Buffer<T> {
  explicit Canaries(int64_t n) : Buffer<T>(n) { clear(); }
  void clear() {
    for (int64_t i = 0; i < this->size; ++i) (*this)[i] = canary<T>();
  }
};

// expanded: one step stands for them all; packed: of each step there are only the rows that take it
enum class Layout { dense, padded, batch_first, expanded, packed };

// Where the rows of each step begin among those of all steps: none, without lengths.
inline std::vector<int64_t> starts_of(int64_t T, const std::vector<int64_t>& lengths) {
  std::vector<int64_t> starts;
  for (int64_t t = 0, rows = 0; t < T && !lengths.empty(); ++t) {
    starts.push_back(rows);
    for (const int64_t length : lengths) rows += t < length;
  }
  return starts;
}

// A (T, B, width) tensor. padding: elements after each row and after the rows of each step; none where it is dense or
// expanded, nor after the steps of a packed one. lengths: of a packed one, not growing with b.
template <class S>
class Rows {
 public:
  Rows(int64_t T, int64_t B, int64_t width, Layout layout, int64_t padding, const std::vector<int64_t>& lengths = {})
      : T(T), B(B), width(width), pad(layout == Layout::dense || layout == Layout::expanded ? 0 : padding),
        stride_t(layout == Layout::expanded      ? 0
                 : layout == Layout::batch_first ? width + pad
                                                 : B * (width + pad) + pad),
        stride_b(layout == Layout::batch_first ? T * (width + pad) + pad : width + pad),
        lengths(layout == Layout::packed ? lengths : std::vector<int64_t>()), starts(starts_of(T, this->lengths)),
        memory(size()) {}
  S& at(int64_t t, int64_t b, int64_t i) { return memory[place(t, b) + i]; }
  double value(int64_t t, int64_t b, int64_t i) { return Type<S>::value(at(t, b, i)); }
  Sequence sequence() const { return {memory.data, stride_t, stride_b}; }
  void clear() { memory.clear(); }

  // Calls f(t, b, element) for each element that there is.
  template <class F>
  void each(F f) {
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t b = 0; b < B; ++b) {
        for (int64_t i = 0; i < width && there(t, b); ++i) f(t, b, at(t, b, i));
      }
    }
  }
  // Those of all T * B rows: 0 where there is none.
  std::vector<double> values() {
    std::vector<double> numbers(T * B * width);
    for (int64_t i = 0; i < T * B * width; ++i) {
      const int64_t t = i / width / B, b = i / width % B;
      if (there(t, b)) numbers[i] = value(t, b, i % width);
    }
    return numbers;
  }

  bool padding_is_intact() {
    std::vector<char> used(memory.size);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t b = 0; b < B && width > 0; ++b) {
        if (there(t, b)) memset(&used[place(t, b)], 1, width);
      }
    }
    const S untouched = canary<S>();
    for (int64_t i = 0; i < memory.size; ++i) {
      if (!used[i] && memcmp(&memory[i], &untouched, sizeof(S)) != 0) return false;
    }
    return true;
  }

 private:
  bool there(int64_t t, int64_t b) const { return lengths.empty() || t < lengths[b]; }
  int64_t place(int64_t t, int64_t b) const {
    return lengths.empty() ? t * stride_t + b * stride_b : (starts[t] + b) * stride_b;
  }
  int64_t size() const {
    if (T * B * width == 0) return 0;
    if (lengths.empty()) return place(T - 1, B - 1) + width;
    int64_t rows = 0;
    for (const int64_t length : lengths) rows += length;
    return rows == 0 ? 0 : (rows - 1) * stride_b + width;
  }

  const int64_t T, B, width, pad, stride_t, stride_b;
  const std::vector<int64_t> lengths, starts;
  Canaries<S> memory;
};

}  // namespace
}  // namespace recattn
