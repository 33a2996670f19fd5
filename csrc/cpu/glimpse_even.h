// Cells of 1, 2, 4 or 8 whole pixels: those of windows that double from scale to scale. All cells of an axis then have
// the same weights, `size` pixels after the cell before:
//
//   value(j) = sum over t of weights[t] * I[start + j * size + t]
//
// Nothing has to be kept for each cell, and sums across need no turning.
#pragma once

#include "glimpse_rows.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr int64_t MOST_EVEN = 8;

template <class R>
struct EvenAxis {
  int64_t start = 0, size = 0, count = 0;  // count: size + 1, or size where the cells' edges are pixels' edges
  R weights[MOST_EVEN + 1];

  // n cells of k pixels around `centre`. False: they are not even, or rounding may tell one edge from another.
  bool set(double centre, double k, int64_t n) {
    if (k != 1 && k != 2 && k != 4 && k != 8) return false;
    // Edges are sums of the centre and a multiple of 1/2: exact below 2^16 if it is a multiple of 2^-36, as it is but for
    // one in thousands where it comes from a float. Numbers around 1.5 * 2^16 are that far apart.
    constexpr double AROUND = 98304;
    if (!(__builtin_fabs(centre) + double(n) * k < 32768) || (centre + AROUND) - AROUND != centre) return false;
    const double edge = centre - double(n) / 2 * k, pixel = down(edge), f = edge - pixel, share = 1 / k;
    size = int64_t(k), start = int64_t(pixel);
    weights[0] = R((1 - f) * share);
    for (int64_t t = 1; t < size; ++t) weights[t] = R(share);
    weights[size] = R(f * share);
    count = weights[size] > 0 ? size + 1 : size;
    return true;
  }

  // Of an axis of N pixels, those that n cells see.
  int64_t low() const { return start < 0 ? 0 : start; }
  int64_t high(int64_t n, int64_t N) const { return least(start + (n - 1) * size + count, N); }

  // What cell j sees of it: `count` pixels from `first` on, the first of weight weights[t].
  struct Taps {
    int64_t first, count, t;
  };
  Taps seen(int64_t j, int64_t N) const {
    const int64_t first = start + j * size, t = first < 0 ? -first : 0, end = least(count, N - first);
    return t < end ? Taps{first + t, end - t, t} : Taps{0, 0, 0};
  }
};

template <class R>
struct EvenAxes {
  EvenAxis<R> down, across;

  // False: the cells are not even.
  bool set(const Glimpse& p, const Place<R>& place) {
    return p.mode == GlimpseMode::area && p.padding == Padding::zeros &&
           down.set(place.centre_y(p), place.k, p.height) && across.set(place.centre_x(p), place.k, p.width);
  }
  bool nothing_seen(const Glimpse& p) const {
    return down.low() >= down.high(p.height, p.H) || across.low() >= across.high(p.width, p.W);
  }
};

// f.operator()<SIZE, MORE>(); MORE: a cell sees SIZE + 1 pixels.
template <class R, class F>
void by_size(const EvenAxis<R>& axis, F f) {
  const auto of = [&]<int SIZE>() {
    axis.count > SIZE ? f.template operator()<SIZE, true>() : f.template operator()<SIZE, false>();
  };
  switch (axis.size) {
    case 1: return of.template operator()<1>();
    case 2: return of.template operator()<2>();
    case 4: return of.template operator()<4>();
    default: return of.template operator()<8>();
  }
}

// The even lanes of a and then of b, and the odd ones.
template <class V>
RECATTN_FN void deal(const V& a, const V& b, V& even, V& odd) {
  constexpr int N = sizeof(V) / sizeof(a[0]);
  if constexpr (N == 2) {
    even = __builtin_shufflevector(a, b, 0, 2);
    odd = __builtin_shufflevector(a, b, 1, 3);
  } else if constexpr (N == 4) {
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
  } else if constexpr (N == 8) {
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
}

// The lanes of a but its first, and then x.
template <class V, class R>
RECATTN_FN V next(const V& a, R x) {
  constexpr int N = sizeof(V) / sizeof(a[0]);
  const V b = V{} + x;
  if constexpr (N == 2) {
    return __builtin_shufflevector(a, b, 1, 2);
  } else if constexpr (N == 4) {
    return __builtin_shufflevector(a, b, 1, 2, 3, 4);
  } else if constexpr (N == 8) {
    return __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8);
  } else {
    return __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
  }
}

// Of LANES<R> groups of SIZE elements each, the first elements and the sums of the others.
template <int SIZE, class R>
struct Groups {
  Vec<R> first, rest;

  explicit Groups(const R* from) {
    if constexpr (SIZE == 1) {
      first = load_vector(from);
      rest = Vec<R>{};
    } else {
      const Groups<SIZE / 2, R> a(from), b(from + LANES<R> * SIZE / 2);
      Vec<R> seconds;
      deal(a.first, b.first, first, seconds);
      rest = seconds;
      if constexpr (SIZE > 2) {
        Vec<R> even, odd;
        deal(a.rest, b.rest, even, odd);
        rest += even + odd;
      }
    }
  }
};

// to[j] = sum over t of weights[t] * from[j * SIZE + t] for `blocks` vectors of cells.
template <int SIZE, bool MORE, class R>
void reduce_even(const R* from, const R* weights, R* to, int64_t blocks) {
  constexpr int L = LANES<R>;
  for (; blocks > 0; --blocks, from += L * SIZE, to += L) {
    const Groups<SIZE, R> groups(from);
    Vec<R> sum = groups.first * weights[0];
    if constexpr (SIZE > 1) sum += groups.rest * weights[1];
    if constexpr (MORE) sum += next(groups.first, from[L * SIZE]) * weights[SIZE];
    store_vector(to, sum);
  }
}

// The inverse of Groups, where all but the first elements of a group are alike.
template <int SIZE, class V>
RECATTN_FN void groups(const V& first, const V& rest, V* to) {
  if constexpr (SIZE == 1) {
    to[0] = first;
  } else {
    V even[SIZE / 2], odd[SIZE / 2];
    groups<SIZE / 2>(first, rest, even);
    groups<SIZE / 2>(rest, rest, odd);
#pragma GCC unroll 4
    for (int i = 0; i < SIZE / 2; ++i) interleave(even[i], odd[i], to[2 * i], to[2 * i + 1]);
  }
}

// line[j * SIZE + t] = weights[t] * cells[j], a sum of two where cells meet, for `blocks` vectors of cells and one element
// more. cells[-1] is 0.
template <int SIZE, bool MORE, class R>
void spread_even(const R* cells, const R* weights, R* line, int64_t blocks) {
  constexpr int L = LANES<R>;
  for (; blocks > 0; --blocks, cells += L, line += L * SIZE) {
    const Vec<R> own = load_vector(cells), before = load_vector(cells - 1);
    Vec<R> first = own * weights[0];
    if constexpr (MORE) first += before * weights[SIZE];
    Vec<R> row[SIZE];
    groups<SIZE>(first, own * weights[SIZE > 1 ? 1 : 0], row);
    memcpy(line, row, sizeof(row));
  }
  line[0] = MORE ? cells[-1] * weights[SIZE] : R(0);
}

// A line that holds a window's columns: those that the image has, in whole vectors where it has them, and zeros.
struct EvenSpan {
  int64_t first, n;  // columns of the image
  int64_t pad;       // elements of the line before them
  int64_t window;    // element of the line that is the window's first column
  int64_t length;    // of the line: all cells in whole vectors can be read from it

  template <class R>
  EvenSpan(const EvenAxis<R>& axis, int64_t cells, int64_t N) {
    constexpr int L = LANES<R>;
    const int64_t low = axis.low(), wanted = ceil_div(axis.high(cells, N) - low, L) * L;
    first = low + wanted <= N ? low : wanted < N ? N - wanted : 0;
    n = least(wanted, N - first);
    pad = axis.start < first ? first - axis.start : 0;
    window = pad + axis.start - first;
    const int64_t read = window + (ceil_div(cells, L) * L + 1) * axis.size + L, written = pad + n;
    length = ceil_div(read > written ? read : written, L) * L;
  }

  // Zeros around what the image has, and a little beyond: before anything is written there.
  template <class R>
  void clear(R* line) const {
    constexpr int L = LANES<R>;
    const Vec<R> zeros = {};
    for (int64_t x = 0; x < pad; x += L) store_vector(line + x, zeros);
    for (int64_t x = (pad + n) / L * L; x < length; x += L) store_vector(line + x, zeros);
  }
};

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
