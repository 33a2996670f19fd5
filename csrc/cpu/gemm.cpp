// C = A B + bias on the CPU, for operands of any strides: the projections of the layers and their gradients.
//
// After Goto and van de Geijn (2008). A tile of C stays in registers while it takes up KC products of each element. Its
// operands are packed into panels that it reads one element after the other: a panel of B stays in the first-level
// cache, a block of panels of A in the second, and all of B, or as much as fits, in the third. Each element of C sums
// its blocks of KC products in their order, so the result does not depend on the number of threads, and the error
// grows with KC + K / KC, not K. Units that multiply tiles (amx.h) do the same with strips. Where A has few rows the
// product costs no more than reading B, and B is not packed; where it has few columns, no more than writing C.
#include "gemm_amx.h"
#include "kernels.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

template <class T> constexpr int64_t KC = 1024 / sizeof(T);  // a panel of B takes two thirds of 48 kB at most
constexpr int64_t MC = 240;
constexpr int64_t SLAB = 4096, BLOCK_A = int64_t(480) << 10;  // bytes: a row of a block of A, and all of it, half of 1 MB
constexpr int64_t NC = 4096;
constexpr int64_t PACKED_B = int64_t(8) << 20;  // bytes
constexpr int64_t FEW_ROWS = 8, FEW_PRODUCTS = 2;
constexpr int64_t STRIP = 256;  // columns

template <class T>
void packed_product(const Product<T>& p) {
  constexpr int N_TILE = NR<T>;
  const int64_t kc = ceil_div(p.K, ceil_div(p.K, KC<T>)), nc = least(round_up(p.N, N_TILE), NC);
  // As many blocks of kc as B's share of the third-level cache holds.
  const int64_t depth = least(round_up(p.K, kc), most(1, PACKED_B / int64_t(sizeof(T)) / (nc * kc)) * kc);
  // As many of these as leave a block of A enough rows: a tile of C takes up all of them before the next one does, and
  // so goes to memory and back once for a slab, not for each kc.
  const int64_t slab = least(depth, most(1, SLAB / int64_t(sizeof(T)) / kc) * kc);
  const int64_t mc_most = most(MR, least(MC, BLOCK_A / int64_t(sizeof(T)) / slab / MR * MR));
  // A task is a block of rows. Where there are too few of them for all threads, it is a share of the columns.
  const bool by_rows = p.M >= 2 * MR * p.threads || p.M >= p.N;
  const int64_t row_tasks = by_rows ? round_up(ceil_div(p.M, mc_most), p.threads) : ceil_div(p.M, mc_most);
  const int64_t col_tasks = by_rows ? 1 : p.threads, mc = round_up(ceil_div(p.M, row_tasks), MR);
  const int64_t a_block = mc / MR * panel_size<MR, T>(kc), b_block = nc / N_TILE * panel_size<N_TILE, T>(kc);
  const Scratch<T> packed_as(p.threads * slab / kc * a_block), packed_b(depth / kc * b_block);
  int started = 0;
#pragma omp parallel num_threads(p.threads)
  {
    int thread;
#pragma omp atomic capture
    thread = started++;
    T* const packed_a = packed_as.data + thread * (slab / kc) * a_block;
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
          for (int64_t s0 = d0; s0 < d1; s0 += slab) {
            const int64_t s1 = least(d1, s0 + slab);
            for (int64_t k = s0; k < s1; k += kc) {
              pack<MR>(p.a.from(i0, k), rows, least(kc, s1 - k), packed_a + (k - s0) / kc * a_block);
            }
            for (int64_t j = from; j < to; j += N_TILE) {
              for (int64_t k = s0; k < s1; k += kc) {
                const int64_t here = least(kc, s1 - k);
                const T* const a = packed_a + (k - s0) / kc * a_block;
                for (int64_t i = 0; i < rows; i += MR) {
                  multiply(a + i / MR * panel_size<MR, T>(here), panels(k, j), here, p.base(i0 + i, j0 + j, k),
                           p.base_row(k), p.c + (i0 + i) * p.c_row + j0 + j, p.c_row, least(MR, rows - i),
                           least(N_TILE, to - j));
                }
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
        Vec<T> sums[L] = {};
        for (int64_t k = 0; k < whole; k += L) {
          const Vec<T> x = load_vector(a + k);
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
  if (!few_columns || (p.a.row != 1 && p.a.col != 1)) {
    if constexpr (std::is_same_v<T, float>) {
      if (product_in_tiles(p)) return;
    }
    return packed_product(p);
  }
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
