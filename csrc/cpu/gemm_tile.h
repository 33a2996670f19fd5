// The tiles of gemm.cpp: panels of A and of B, packed in the order in which a tile of C reads them, and their product.
#pragma once

#include <new>
#include <utility>

#include "vector.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

// A tile has MR rows and NR columns, which are two vectors: what leaves registers for a row of B and an element of A.
constexpr int MR = VECTOR_BYTES == 64 ? 12 : VECTOR_BYTES == 32 ? 6 : 4;
template <class T> constexpr int NR = 2 * LANES<T>;

// Element (i, j) is data[i * row + j * col].
template <class T> struct Matrix {
  const T* data;
  int64_t row, col;
  const T* at(int64_t i, int64_t j) const { return data + i * row + j * col; }
  Matrix from(int64_t i, int64_t j) const { return {at(i, j), row, col}; }
  Matrix transposed() const { return {data, col, row}; }
};

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

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
RECATTN_FN void transpose(Vec<T> (&v)[LANES<T>]) {
  constexpr int L = LANES<T>, BLOCK = 16 / sizeof(T), BLOCKS = L / BLOCK;
  constexpr auto lanes = std::make_integer_sequence<int, L>();
  using Across = Deinterleave<L, BLOCK>;
  for (int i = 0; i < L; i += 2) shuffle<Interleave<L, BLOCK, 1>>(v[i], v[i + 1], v[i], v[i + 1], lanes);
  if constexpr (BLOCK == 4) {
    for (int i = 0; i < L; i += 4) {
      const Vec<T> low = v[i + 1];
      shuffle<Interleave<L, BLOCK, 2>>(v[i], v[i + 1], v[i], v[i + 2], lanes);
      shuffle<Interleave<L, BLOCK, 2>>(v[i + 2], v[i + 3], low, v[i + 3], lanes);
    }
  }
  if constexpr (BLOCKS == 2) {
    for (int i = 0; i < BLOCK; ++i) shuffle<Across>(v[i], v[i + BLOCK], v[i], v[i + BLOCK], lanes);
  }
  if constexpr (BLOCKS == 4) {
    for (int i = 0; i < BLOCK; ++i) {
      Vec<T> even[2], odd[2];
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
    // The vectors of the last group of rows reach into the next k, the first group of which is stored after them, or
    // past the end: a panel has room for that.
    for (int group = (W - 1) / L * L; group >= 0; group -= L) {
      Vec<T> v[L];
      for (int i = 0; i < L; ++i) {
        v[i] = group + i < W && group + i < rows ? load_vector(from.at(group + i, k)) : Vec<T>{};
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
  Vec<T> sum[MR][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<T> b0 = load_vector(b + k * NR<T>), b1 = load_vector(b + k * NR<T> + L);
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

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
