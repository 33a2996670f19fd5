// csrc/cpu/gemm.cpp against a loop in double precision.
//
// The operands hold small integers: their products and sums are exact in float32 too, whatever their order, and must be
// equal. Every operand is an allocation of its exact size, so that AddressSanitizer sees an access one element past it,
// and what lies between its elements is NaN. So is C before: it may not be read.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <utility>

#include "check.h"

namespace recattn {
namespace {

using Random = std::mt19937_64;

enum class Layout { rows, columns, strided };  // which elements are neighbours

template <class T>
class Operand {
 public:
  Operand(int64_t rows, int64_t cols, Layout layout, int64_t padding)
      : rows(rows), cols(cols),
        row(layout == Layout::columns ? 1 : layout == Layout::rows ? cols + padding : 2 * cols + padding),
        col(layout == Layout::columns ? rows + padding : layout == Layout::rows ? 1 : 2),
        memory(rows * cols > 0 ? (rows - 1) * row + (cols - 1) * col + 1 : 0, T(NAN)) {}
  T& at(int64_t i, int64_t j) { return memory[i * row + j * col]; }

  template <class F>
  void fill(F draw) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) at(i, j) = T(draw());
    }
  }

  const int64_t rows, cols, row, col;
  std::vector<T> memory;
};

struct Case {
  int64_t M, N, K;
  Layout a, b;
  int64_t padding;
  bool bias, special;

  std::string text(const char* isa, int threads) const {
    std::string words = isa;
    for (const int64_t n : {M, N, K, int64_t(a), int64_t(b), padding, int64_t(threads)}) words += " " + std::to_string(n);
    return words + (bias ? " bias" : "") + (special ? " NaN" : "");
  }
};

template <class T>
class Test {
 public:
  Test(const Case& c, Random& random)
      : c(c), a(c.M, c.K, c.a, c.padding), b(c.K, c.N, c.b, c.padding), bias(c.bias ? c.N : 0), exact(c.M * c.N) {
    const auto integer = [&] { return double(int(random() % 9) - 4); };
    a.fill(integer);
    b.fill(integer);
    for (T& v : bias) v = T(integer());
    if (c.special && c.M * c.N * c.K > 0) {
      const T values[] = {T(NAN), T(INFINITY), T(-INFINITY)};
      a.at(random() % c.M, random() % c.K) = values[random() % 3];
      b.at(random() % c.K, random() % c.N) = values[random() % 3];
    }
    std::vector<double> row(c.N);
    for (int64_t i = 0; i < c.M; ++i) {
      for (int64_t j = 0; j < c.N; ++j) row[j] = c.bias ? bias[j] : 0.0;
      for (int64_t k = 0; k < c.K; ++k) {
        for (int64_t j = 0; j < c.N; ++j) row[j] += double(a.at(i, k)) * double(b.at(k, j));
      }
      for (int64_t j = 0; j < c.N; ++j) exact[i * c.N + j] = row[j];
    }
  }

  // Calls check(i, j, value) for each element of C.
  template <class F>
  void run(const Isa& isa, int threads, F check) {
    Operand<T> out(c.M, c.N, Layout::rows, c.padding);
    const Dtype dtype = sizeof(T) == 4 ? Dtype::float32 : Dtype::float64;
    isa.take();
    RECATTN_RUN(gemm, {c.M, c.N, c.K, dtype, a.memory.data(), a.row, a.col, b.memory.data(), b.row, b.col, out.memory.data(),
              out.row, c.bias ? bias.data() : nullptr, threads});
    for (int64_t i = 0; i < c.M; ++i) {
      for (int64_t j = 0; j < c.N; ++j) check(i, j, out.at(i, j));
      for (int64_t j = c.N; j < out.row && i + 1 < c.M && c.N > 0; ++j) {
        CHECK(std::isnan(out.at(i, j)), "[%d, %d] is written: %s", int(i), int(j), c.text(isa.name, threads).c_str());
      }
    }
  }

  void run_exactly(const Isa& isa, int threads) {
    run(isa, threads, [&](int64_t i, int64_t j, T got) {
      const double want = exact[i * c.N + j];
      CHECK(got == want || (want != want && got != got), "[%d, %d] is %g, not %g: %s", int(i), int(j), double(got), want,
            c.text(isa.name, threads).c_str());
    });
  }

  const Case c;
  Operand<T> a, b;
  std::vector<T> bias;
  std::vector<double> exact;
};

template <class T>
void check_exactly(const std::vector<Isa>& isas, const Case& c, Random& random) {
  Test<T> test(c, random);
  for (const Isa& isa : isas) test.run_exactly(isa, 1 + int(random() % 3));
}

// Numbers that round: the same bits for any number of threads, and an error that does not grow with K as that of one
// long sum would.
template <class T>
void check_rounding(const std::vector<Isa>& isas, const Case& c, Random& random) {
  Test<T> test(c, random);
  const auto positive = [&] { return std::uniform_real_distribution<double>(0.5, 1.5)(random); };
  test.a.fill(positive);
  test.b.fill(positive);
  std::vector<long double> exact;
  for (int64_t i = 0; i < c.M; ++i) {
    for (int64_t j = 0; j < c.N; ++j) {
      long double sum = c.bias ? test.bias[j] : T(0);
      for (int64_t k = 0; k < c.K; ++k) sum += (long double)(test.a.at(i, k)) * test.b.at(k, j);
      exact.push_back(sum);
    }
  }
  for (const Isa& isa : isas) {
    std::vector<T> first;
    test.run(isa, 1, [&](int64_t i, int64_t j, T got) {
      const long double want = exact[i * c.N + j];
      // Half an epsilon for each sum of a block, and for each sum of the blocks.
      const double bound = (256 + 2 + c.K / 64) * 0.5 * std::numeric_limits<T>::epsilon() * double(want) * 1.01;
      CHECK(std::fabs(double(got - want)) <= bound, "[%d, %d] is %.17g, not %.17g to within %.3g: %s", int(i), int(j),
            double(got), double(want), bound, c.text(isa.name, 1).c_str());
      first.push_back(got);
    });
    for (int threads = 2; threads <= 3; ++threads) {
      test.run(isa, threads, [&](int64_t i, int64_t j, T got) {
        CHECK(memcmp(&got, &first[i * c.N + j], sizeof got) == 0, "[%d, %d] depends on the threads: %s", int(i), int(j),
              c.text(isa.name, threads).c_str());
      });
    }
  }
}

template <class T>
void check_column_sum(const std::vector<Isa>& isas, int64_t M, int64_t N, Random& random) {
  Operand<T> a(M, N, Layout::rows, 3);
  a.fill([&] { return std::uniform_real_distribution<double>(0.5, 1.5)(random); });
  if (M * N > 0) a.at(M / 2, N / 2) = T(NAN);
  for (const Isa& isa : isas) {
    for (int threads = 1; threads <= 3; ++threads) {
      std::vector<T> out(N, T(-1));
      isa.take();
      RECATTN_RUN(column_sum, {M, N, sizeof(T) == 4 ? Dtype::float32 : Dtype::float64, a.memory.data(), a.row, out.data(), threads});
      for (int64_t j = 0; j < N; ++j) {
        long double sum = 0;
        for (int64_t i = 0; i < M; ++i) sum += a.at(i, j);
        const double want = double(sum), bound = (std::numeric_limits<T>::epsilon() + M * 0x1p-53) * want;
        CHECK(want != want ? out[j] != out[j] : std::fabs(out[j] - want) <= bound,
              "column %d is %.17g, not %.17g: %s, M N %d %d, threads %d", int(j), double(out[j]), want, isa.name, int(M),
              int(N), threads);
      }
    }
  }
}

}  // namespace

int test_gemm(const std::vector<Isa>& isas) {
  constexpr int64_t sizes[] = {1, 2, 5, 13, 31, 33, 65, 130, 300};
  Random random(0);
  int cases = 0;
  // The options are drawn: each meets every size of each dimension many times over.
  const auto options = [&](int64_t M, int64_t N, int64_t K) {
    return Case{M, N, K, Layout(random() % 3), Layout(random() % 3), int64_t(random() % 2 * 3), random() % 2 == 0,
                random() % 4 == 0};
  };
  const auto exactly = [&](const Case& c, bool wide) {
    wide ? check_exactly<double>(isas, c, random) : check_exactly<float>(isas, c, random);
    ++cases;
  };
  for (const int64_t M : sizes) {
    for (const int64_t N : sizes) {
      for (const int64_t K : sizes) {
        for (int repeat = 0; repeat < (M * N * K < 130 * 130 * 130 ? 4 : 1); ++repeat) {
          exactly(options(M, N, K), random() % 2);
        }
      }
    }
  }
  for (const bool wide : {false, true}) {
    // Every layout of both operands: few rows, few columns, neither.
    for (const auto& [M, N] : {std::pair<int64_t, int64_t>{3, 70}, {70, 3}, {70, 70}}) {
      for (int layouts = 0; layouts < 9; ++layouts) {
        exactly({M, N, 300, Layout(layouts / 3), Layout(layouts % 3), 3, layouts % 2 == 0, false}, wide);
      }
    }
    // Nothing to sum, nothing at all, more columns than are packed at once, and more of K.
    const int64_t rest[][3] = {{3, 5, 0}, {40, 33, 0}, {0, 5, 3}, {5, 0, 3}, {30, 4200, 7}, {13, 33, 34000}};
    for (const auto& [M, N, K] : rest) exactly(options(M, N, K), wide);
  }
  for (const auto& [M, N, K] : {std::tuple<int64_t, int64_t, int64_t>{3, 700, 700}, {700, 3, 700}, {130, 300, 700},
                                {20, 300, 3000}}) {
    Case c = options(M, N, K);
    c.special = false;
    for (int layouts = 0; layouts < 9; ++layouts, ++cases) {
      c.a = Layout(layouts / 3), c.b = Layout(layouts % 3);
      layouts % 2 ? check_rounding<double>(isas, c, random) : check_rounding<float>(isas, c, random);
    }
  }
  for (const int64_t M : {0, 1, 7, 1000}) {
    for (const int64_t N : {0, 1, 33, 300, 1100}) {
      check_column_sum<float>(isas, M, N, random);
      check_column_sum<double>(isas, M, N, random);
      ++cases;
    }
  }
  std::printf("gemm: %d cases on each instruction set: %d failed checks\n", cases, failures);
  return failures;
}

}  // namespace recattn
