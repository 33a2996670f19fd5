// C = A B + bias on the CPU, for operands of any strides: the projections of the layers and their gradients.
//
// After Goto and van de Geijn (2008). A tile of C stays in registers while it takes up KC products of each element. Its
// operands are packed into panels that it reads one element after the other: a panel of B stays in the first-level
// cache, a block of panels of A in the second, and all of B, or as much as fits, in the third. Each element of C sums
// its blocks of KC products in their order, so the result does not depend on the number of threads, and the error
// grows with KC + K / KC, not K. Where A has few rows the product costs no more than reading B, and B is not packed;
// where it has few columns, no more than writing C.
#include <new>
#include <utility>

#include "kernels.h"
#include "numeric.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

// A tile has MR rows and NR columns, which are two vectors: what leaves registers for a row of B and an element of A.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, MR = 12;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, MR = 6;
#else
constexpr int VECTOR_BYTES = 16, MR = 4;
#endif
template <class T> constexpr int LANES = VECTOR_BYTES / int(sizeof(T));
template <class T> constexpr int NR = 2 * LANES<T>;
template <class T> constexpr int64_t KC = 1024 / sizeof(T);  // a panel of B takes two thirds of 48 kB at most
constexpr int64_t MC = 240;                                  // a block of A takes a quarter of 1 MB
constexpr int64_t NC = 4096;
constexpr int64_t PACKED_B = int64_t(8) << 20;  // bytes
constexpr int64_t FEW_ROWS = 8, FEW_PRODUCTS = 2;
constexpr int64_t STRIP = 256;  // columns

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class T> struct VectorOf {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class T> using Vector = typename VectorOf<T>::type;

template <class T>
RECATTN_FN Vector<T> load_vector(const T* from) {
  Vector<T> v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
RECATTN_FN void store_vector(T* to, Vector<T> v) {
  memcpy(to, &v, sizeof v);
}

// Element (i, j) is data[i * row + j * col].
template <class T> struct Matrix {
  const T* data;
  int64_t row, col;
  const T* at(int64_t i, int64_t j) const { return data + i * row + j * col; }
  Matrix from(int64_t i, int64_t j) const { return {at(i, j), row, col}; }
  Matrix transposed() const { return {data, col, row}; }
};

template <class T> struct Product {
  int64_t M, N, K;
  Matrix<T> a, b;
  T* c;
  int64_t c_row;
  const T* bias;  // (N,) or null
  int threads;

  // What the products from k on of C[i, j...] are added to: the bias at first, for C may hold anything.
  const T* base(int64_t i, int64_t j, int64_t k) const { return k > 0 ? c + i * c_row + j : bias ? bias + j : nullptr; }
  int64_t base_row(int64_t k) const { return k > 0 ? c_row : 0; }
};

// Memory for n elements.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data(static_cast<T*>(operator new(n * sizeof(T), std::align_val_t(64)))) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { operator delete(data, std::align_val_t(64)); }
  T* const data;
};

// The lanes that two vectors together have after one instruction, first or second of two.
template <int L, int BLOCK, int G> struct Interleave {  // the halves of each block, G lanes in turn
  static constexpr int lane(int j, int second) {
    const int in_block = j % BLOCK;
    return j - in_block + second * BLOCK / 2 + in_block / (2 * G) * G + in_block % G + (in_block / G % 2 ? L : 0);
  }
};
template <int L, int BLOCK> struct Deinterleave {  // every other block
  static constexpr int lane(int j, int second) { return (j / BLOCK * 2 + second) * BLOCK + j % BLOCK; }
};

template <class Pattern, class V, int... J>
RECATTN_FN void shuffle(V& first, V& second, V a, V b, std::integer_sequence<int, J...>) {
  first = __builtin_shufflevector(a, b, Pattern::lane(J, 0)...);
  second = __builtin_shufflevector(a, b, Pattern::lane(J, 1)...);
}

// Transposes a square: first within blocks of 128 bits, then the blocks.
template <class T>
RECATTN_FN void transpose(Vector<T> (&v)[LANES<T>]) {
  constexpr int L = LANES<T>, BLOCK = 16 / sizeof(T), BLOCKS = L / BLOCK;
  constexpr auto lanes = std::make_integer_sequence<int, L>();
  using Across = Deinterleave<L, BLOCK>;
  for (int i = 0; i < L; i += 2) shuffle<Interleave<L, BLOCK, 1>>(v[i], v[i + 1], v[i], v[i + 1], lanes);
  if constexpr (BLOCK == 4) {
    for (int i = 0; i < L; i += 4) {
      const Vector<T> low = v[i + 1];
      shuffle<Interleave<L, BLOCK, 2>>(v[i], v[i + 1], v[i], v[i + 2], lanes);
      shuffle<Interleave<L, BLOCK, 2>>(v[i + 2], v[i + 3], low, v[i + 3], lanes);
    }
  }
  if constexpr (BLOCKS == 2) {
    for (int i = 0; i < BLOCK; ++i) shuffle<Across>(v[i], v[i + BLOCK], v[i], v[i + BLOCK], lanes);
  }
  if constexpr (BLOCKS == 4) {
    for (int i = 0; i < BLOCK; ++i) {
      Vector<T> even[2], odd[2];
      shuffle<Across>(even[0], odd[0], v[i], v[i + BLOCK], lanes);
      shuffle<Across>(even[1], odd[1], v[i + 2 * BLOCK], v[i + 3 * BLOCK], lanes);
      shuffle<Across>(v[i], v[i + 2 * BLOCK], even[0], even[1], lanes);
      shuffle<Across>(v[i + BLOCK], v[i + 3 * BLOCK], odd[0], odd[1], lanes);
    }
  }
}

// A panel of W rows, of which `rows` exist, whose elements (i, k), (i, k + 1) are neighbours: to[k * W + i].
template <int W, class T>
void pack_transposed(Matrix<T> from, int64_t rows, int64_t depth, T* to) {
  constexpr int L = LANES<T>;
  int64_t k = 0;
  for (; k + L <= depth; k += L) {
    // The vectors of the last group of rows reach into the next k, the first group of which is stored after them, or past
    // the end: a panel has room for that.
    for (int group = (W - 1) / L * L; group >= 0; group -= L) {
      Vector<T> v[L];
      for (int i = 0; i < L; ++i) {
        v[i] = group + i < W && group + i < rows ? load_vector(from.at(group + i, k)) : Vector<T>{};
      }
      transpose<T>(v);
      for (int i = 0; i < L; ++i) store_vector(to + (k + i) * W + group, v[i]);
    }
  }
  for (; k < depth; ++k) {
    for (int i = 0; i < W; ++i) to[k * W + i] = i < rows ? *from.at(i, k) : T(0);
  }
}

// The elements from one panel to the next: without the last vector panels of 256 would all begin in the same set of the
// first-level cache.
template <int W, class T>
constexpr int64_t panel_size(int64_t depth) {
  return W * depth + LANES<T>;
}

// Rows by depth elements as panels of W rows, the last filled up with zeros: panel[k * W + i].
template <int W, class T>
void pack(Matrix<T> from, int64_t rows, int64_t depth, T* to) {
  const int64_t whole = rows / W * W, size = panel_size<W, T>(depth);
  if (from.row == 1) {  // in the order of memory, which jumps from one k to the next: prefetchers do not follow
    constexpr int64_t AHEAD = 16, LINE = 64 / sizeof(T);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = 0; i < rows; i += LINE) __builtin_prefetch(from.at(i, k + AHEAD));
      T* panel = to + k * W;
      for (int64_t i = 0; i < whole; i += W, panel += size) memcpy(panel, from.at(i, k), W * sizeof(T));
      if (whole == rows) continue;
      for (int i = 0; i < W; ++i) panel[i] = whole + i < rows ? *from.at(whole + i, k) : T(0);
    }
    return;
  }
  for (int64_t i = 0; i < rows; i += W, to += size) {
    const int64_t n = least(W, rows - i);
    if (from.col == 1) {
      pack_transposed<W>(from.from(i, 0), n, depth, to);
      continue;
    }
    for (int64_t k = 0; k < depth; ++k) {
      for (int j = 0; j < W; ++j) to[k * W + j] = j < n ? *from.at(i + j, k) : T(0);
    }
  }
}

// A tile of C, or its part of rows by cols, from a panel of A and one of B: C = base + A B.
template <class T>
void multiply(const T* __restrict a, const T* __restrict b, int64_t depth, const T* base, int64_t base_row, T* c,
              int64_t c_row, int64_t rows, int64_t cols) {
  constexpr int L = LANES<T>;
  if (rows == MR && cols == NR<T>) {
    for (int i = 0; i < MR; ++i) {
      __builtin_prefetch(c + i * c_row, 1);
      __builtin_prefetch(c + i * c_row + L, 1);
    }
  }
  Vector<T> sum[MR][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vector<T> b0 = load_vector(b + k * NR<T>), b1 = load_vector(b + k * NR<T> + L);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const T x = a[k * MR + i];
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
  if (rows == MR && cols == NR<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      for (int j = 0; j < 2; ++j) {
        if (base) sum[i][j] += load_vector(base + i * base_row + j * L);
        store_vector(c + i * c_row + j * L, sum[i][j]);
      }
    }
    return;
  }
  T part[MR * NR<T>];
  memcpy(part, sum, sizeof part);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      c[i * c_row + j] = base ? base[i * base_row + j] + part[i * NR<T> + j] : part[i * NR<T> + j];
    }
  }
}

template <class T>
void packed_product(const Product<T>& p) {
  constexpr int N_TILE = NR<T>;
  const int64_t kc = ceil_div(p.K, ceil_div(p.K, KC<T>)), nc = least(round_up(p.N, N_TILE), NC);
  // As many blocks of kc as B's share of the third-level cache holds.
  const int64_t depth = least(round_up(p.K, kc), most(1, PACKED_B / int64_t(sizeof(T)) / (nc * kc)) * kc);
  // A task is a block of rows. Where there are too few of them for all threads, it is a share of the columns.
  const bool by_rows = p.M >= 2 * MR * p.threads || p.M >= p.N;
  const int64_t row_tasks = by_rows ? round_up(ceil_div(p.M, MC), p.threads) : ceil_div(p.M, MC);
  const int64_t col_tasks = by_rows ? 1 : p.threads, mc = round_up(ceil_div(p.M, row_tasks), MR);
  const int64_t a_block = mc / MR * panel_size<MR, T>(kc), b_block = nc / N_TILE * panel_size<N_TILE, T>(kc);
  const Scratch<T> packed_as(p.threads * a_block), packed_b(depth / kc * b_block);
  int started = 0;
#pragma omp parallel num_threads(p.threads)
  {
    int thread;
#pragma omp atomic capture
    thread = started++;
    T* const packed_a = packed_as.data + thread * a_block;
    for (int64_t j0 = 0; j0 < p.N; j0 += nc) {
      const int64_t columns = least(nc, p.N - j0), share = round_up(ceil_div(columns, col_tasks), N_TILE);
      for (int64_t d0 = 0; d0 < p.K; d0 += depth) {
        const int64_t d1 = least(p.K, d0 + depth), blocks = ceil_div(d1 - d0, kc);
        const auto panels = [&](int64_t k, int64_t j) {  // those of columns j... in the block of K that begins at k
          return packed_b.data + (k - d0) / kc * b_block + j / N_TILE * panel_size<N_TILE, T>(least(kc, d1 - k));
        };
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < ceil_div(columns, 8 * N_TILE) * blocks; ++task) {
          const int64_t k = d0 + task % blocks * kc, j = task / blocks * 8 * N_TILE;
          pack<N_TILE>(p.b.from(k, j0 + j).transposed(), least(8 * N_TILE, columns - j), least(kc, d1 - k),
                       panels(k, j));
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < ceil_div(p.M, mc) * col_tasks; ++task) {
          const int64_t i0 = task / col_tasks * mc, rows = least(mc, p.M - i0);
          const int64_t from = task % col_tasks * share, to = least(columns, from + share);
          for (int64_t k = d0; k < d1; k += kc) {
            const int64_t here = least(kc, d1 - k);
            pack<MR>(p.a.from(i0, k), rows, here, packed_a);
            for (int64_t j = from; j < to; j += N_TILE) {
              for (int64_t i = 0; i < rows; i += MR) {
                multiply(packed_a + i / MR * panel_size<MR, T>(here), panels(k, j), here, p.base(i0 + i, j0 + j, k), p.base_row(k),
                         p.c + (i0 + i) * p.c_row + j0 + j, p.c_row, least(MR, rows - i), least(N_TILE, to - j));
              }
            }
          }
        }
      }
    }
  }
}

// Few rows of A, the columns of B in place: C[i, j] = base + sum of A[i, k...] * B[k..., j], both vectors along k.
template <class T>
void few_rows_by_columns(const Product<T>& p) {
  constexpr int L = LANES<T>;
  const Scratch<T> rows(p.M * p.K);
  for (int64_t i = 0; i < p.M; ++i) {
    for (int64_t k = 0; k < p.K; ++k) rows.data[i * p.K + k] = *p.a.at(i, k);
  }
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int64_t j = 0; j < p.N; j += L) {
    const int64_t n = least(L, p.N - j);
    for (int64_t k0 = 0; k0 < p.K; k0 += KC<T>) {
      const T* columns[L];  // the last one stands for those beyond it
      for (int l = 0; l < L; ++l) columns[l] = p.b.at(k0, j + least(l, n - 1));
      const int64_t depth = least(KC<T>, p.K - k0), whole = depth / L * L;
      for (int64_t i = 0; i < p.M; ++i) {
        const T* a = rows.data + i * p.K + k0;
        Vector<T> sums[L] = {};
        for (int64_t k = 0; k < whole; k += L) {
          const Vector<T> x = load_vector(a + k);
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) sums[l] += x * load_vector(columns[l] + k);
        }
        transpose<T>(sums);
        for (int half = L / 2; half > 0; half /= 2) {
          for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
        }
        T sum[L];
        store_vector(sum, sums[0]);
        const T* base = p.base(i, j, k0);
        for (int l = 0; l < n; ++l) {
          for (int64_t k = whole; k < depth; ++k) sum[l] += a[k] * columns[l][k];
          p.c[i * p.c_row + j + l] = base ? base[l] + sum[l] : sum[l];
        }
      }
    }
  }
}

// Few rows of A, the rows of B in place: C[i, j...] = base + sum of A[i, k] * B[k, j...].
template <class T>
void few_rows_by_rows(const Product<T>& p) {
  constexpr int AT_ONCE = 8;
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int64_t j0 = 0; j0 < p.N; j0 += STRIP) {
    const int64_t n = least(STRIP, p.N - j0);
    for (int64_t k0 = 0; k0 < p.K; k0 += KC<T>) {
      const int64_t k1 = least(p.K, k0 + KC<T>);
      T sums[FEW_ROWS][STRIP] = {};
      int64_t k = k0;
      for (; k + AT_ONCE <= k1; k += AT_ONCE) {
        const T *b = p.b.at(k, j0), *b1 = b + p.b.row, *b2 = b1 + p.b.row, *b3 = b2 + p.b.row;
        const T *b4 = b3 + p.b.row, *b5 = b4 + p.b.row, *b6 = b5 + p.b.row, *b7 = b6 + p.b.row;
        for (int64_t i = 0; i < p.M; ++i) {
          T a[AT_ONCE];
          for (int l = 0; l < AT_ONCE; ++l) a[l] = *p.a.at(i, k + l);
          T* __restrict sum = sums[i];
          for (int64_t j = 0; j < n; ++j) {
            sum[j] += a[0] * b[j] + a[1] * b1[j] + a[2] * b2[j] + a[3] * b3[j] + a[4] * b4[j] + a[5] * b5[j] +
                      a[6] * b6[j] + a[7] * b7[j];
          }
        }
      }
      for (; k < k1; ++k) {
        const T* b = p.b.at(k, j0);
        for (int64_t i = 0; i < p.M; ++i) {
          const T a = *p.a.at(i, k);
          T* __restrict sum = sums[i];
          for (int64_t j = 0; j < n; ++j) sum[j] += a * b[j];
        }
      }
      for (int64_t i = 0; i < p.M; ++i) {
        const T* base = p.base(i, j0, k0);
        T* c = p.c + i * p.c_row + j0;
        for (int64_t j = 0; j < n; ++j) c[j] = base ? base[j] + sums[i][j] : sums[i][j];
      }
    }
  }
}

// Few products for each element of C, row by row as memory takes it: C[i, j...] = base + sum of A[i, k] * B[k, j...].
template <class T>
void few_products(const Product<T>& p) {
  const Scratch<T> rows(p.K * p.N);
  for (int64_t k = 0; k < p.K; ++k) {
    for (int64_t j = 0; j < p.N; ++j) rows.data[k * p.N + j] = *p.b.at(k, j);
  }
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int64_t i = 0; i < p.M; ++i) {
    T* __restrict c = p.c + i * p.c_row;
    for (int64_t k = 0; k < p.K; ++k) {
      const T a = *p.a.at(i, k);
      const T* b = rows.data + k * p.N;
      if (k > 0) {
        for (int64_t j = 0; j < p.N; ++j) c[j] += a * b[j];
      } else if (p.bias) {
        for (int64_t j = 0; j < p.N; ++j) c[j] = p.bias[j] + a * b[j];
      } else {
        for (int64_t j = 0; j < p.N; ++j) c[j] = a * b[j];
      }
    }
  }
}

template <class T>
void product(const Product<T>& p) {
  const bool few_rows = p.M <= FEW_ROWS, few_columns = !few_rows && p.N <= FEW_ROWS;
  if (few_rows && p.b.row == 1) return few_rows_by_columns(p);
  if (few_rows && p.b.col == 1) return few_rows_by_rows(p);
  if (p.K <= FEW_PRODUCTS) return few_products(p);
  if (!few_columns || (p.a.row != 1 && p.a.col != 1)) return packed_product(p);
  // Few columns of B are few rows of it, transposed.
  const Scratch<T> c(p.M * p.N);
  product<T>({p.N, p.M, p.K, p.b.transposed(), p.a.transposed(), c.data, p.M, nullptr, p.threads});
  for (int64_t i = 0; i < p.M; ++i) {
    for (int64_t j = 0; j < p.N; ++j) {
      p.c[i * p.c_row + j] = p.bias ? p.bias[j] + c.data[j * p.M + i] : c.data[j * p.M + i];
    }
  }
}

// Below this many products a thread costs more than it brings.
inline int threads_for(int64_t products, int threads) { return products < (1 << 17) ? 1 : threads; }

template <class T>
void gemm(const Gemm& p) {
  const T* bias = static_cast<const T*>(p.bias);
  T* c = static_cast<T*>(p.c);
  if (p.M == 0 || p.N == 0) return;
  if (p.K == 0) {
    for (int64_t i = 0; i < p.M; ++i) {
      for (int64_t j = 0; j < p.N; ++j) c[i * p.c_row + j] = bias ? bias[j] : T(0);
    }
    return;
  }
  const Matrix<T> a = {static_cast<const T*>(p.a), p.a_row, p.a_col}, b = {static_cast<const T*>(p.b), p.b_row, p.b_col};
  product<T>({p.M, p.N, p.K, a, b, c, p.c_row, bias, threads_for(p.M * p.N * p.K, p.threads)});
}

template <class T>
void sum_columns(const ColumnSum& p) {
  const T* a = static_cast<const T*>(p.a);
  T* out = static_cast<T*>(p.out);
  const int64_t width = least(STRIP, round_up(p.N / p.threads + 1, 16));
#pragma omp parallel for schedule(static) num_threads(threads_for(p.M * p.N, p.threads))
  for (int64_t j0 = 0; j0 < p.N; j0 += width) {
    const int64_t n = least(width, p.N - j0);
    double sums[STRIP] = {};  // a float would lose digits over many rows
    for (int64_t i = 0; i < p.M; ++i) {
      const T* row = a + i * p.a_row + j0;
      for (int64_t j = 0; j < n; ++j) sums[j] += double(row[j]);
    }
    for (int64_t j = 0; j < n; ++j) out[j0 + j] = T(sums[j]);
  }
}

}  // namespace

void gemm(const Gemm& p) { p.dtype == Dtype::float64 ? gemm<double>(p) : gemm<float>(p); }

void column_sum(const ColumnSum& p) { p.dtype == Dtype::float64 ? sum_columns<double>(p) : sum_columns<float>(p); }

}  // namespace RECATTN_ISA
}  // namespace recattn
