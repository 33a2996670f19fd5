// The gradients of glimpses, none of which depends on the threads.
//
//   dI[y][x] = sum over glimpses, scales, i, j of wy(i, y) wx(j, x) dout[i][j]: each band of an image's rows gathers
//              what falls on it, always in the same order
//   dc = sum of dout[i][j] * slope * (E[i][upper(j)] - E[i][lower(j)]), E[i][x] = sum over y of wy(i, y) I[y][x]: lines
//        along the cells' edges; in y alike
//   dk = sum of dout[i][j] * slope * (m(j) (E[i][upper(j)] - E[i][lower(j)]) + E[i][upper(j)] - out[i][j]), for area;
//        the last two terms, by which a cell grows about its lower edge, are not there in bilinear; in y alike
#include "glimpse_even.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

constexpr int64_t BAND_BYTES = 1 << 18;  // of an image's gradient, in the second-level cache while glimpses add to it

template <class R>
void add_scaled(R* __restrict to, const R* __restrict from, R scale, int64_t n) {
  int64_t x = 0;
  for (; x + LANES<R> <= n; x += LANES<R>) {
    store_vector(to + x, load_vector(to + x) + load_vector(from + x) * scale);
  }
  for (; x < n; ++x) to[x] += from[x] * scale;
}

template <class S, class R>
class Image {
 public:
  explicit Image(const GlimpseBackward& p) : p_(p) {}

  // Rows top to bottom of image b's gradient, all channels.
  void operator()(int64_t b, int64_t top, int64_t bottom) {
    top_ = top, bottom_ = bottom;
    const int64_t rows = bottom - top;
    S* const to = static_cast<S*>(p_.grad_image) + b * p_.C * p_.H * p_.W + top * p_.W;
    if constexpr (sizeof(S) == sizeof(R)) {
      band_ = to;
      plane_ = p_.H * p_.W;
    } else {
      band_ = band_buffer_.at_least(p_.C * rows * p_.W);
      plane_ = rows * p_.W;
    }
    for (int64_t c = 0; c < p_.C; ++c) memset(band_ + c * plane_, 0, rows * p_.W * sizeof(R));
    for (int64_t g = 0; g < p_.G; ++g) {
      for (int64_t s = 0; s < p_.S; ++s) gather(b, g, s);
    }
    if constexpr (sizeof(S) == 2) {
      for (int64_t c = 0; c < p_.C; ++c) narrow(to + c * p_.H * p_.W, band_ + c * plane_, rows * p_.W);
    }
  }

 private:
  const GlimpseBackward& p_;
  Axis<R> down_, across_;
  EvenAxes<R> even_;
  Buffer<R> band_buffer_, line_buffer_, cell_buffer_;
  R* band_ = nullptr;
  int64_t top_ = 0, bottom_ = 0, plane_ = 0;

  void gather(int64_t b, int64_t g, int64_t s) {
    const Place<R> place(p_, b, g, s);
    if (!place.valid) return;
    if (p_.mode == GlimpseMode::area || p_.mode == GlimpseMode::bilinear) {
      if (p_.padding == Padding::zeros) {  // most windows miss most bands: seen from their ends alone
        const double centre = place.centre_y(p_), reach = double(p_.height) / 2 * place.k + 2;
        if (centre + reach < double(top_) || centre - reach > double(bottom_)) return;
      }
      if (even_.set(p_, place)) return even(((b * p_.G + g) * p_.S + s) * p_.C * p_.height);
      down_.smooth(p_, place.centre_y(p_), place.k, p_.height, p_.H, 0, p_.height, false);
      if (down_.high <= top_ || down_.low >= bottom_) return;
      across_.smooth(p_, place.centre_x(p_), place.k, p_.width, p_.W, 0, p_.width, false);
    } else {
      const int64_t tall = window_of(p_.height, p_.factor, s), wide = window_of(p_.width, p_.factor, s);
      const int64_t seen = p_.mode == GlimpseMode::kevinzakka ? p_.H : p_.W;
      const int64_t y = window_start(p_.mode, place.y, p_.H, p_.H, p_.height, tall);
      const int64_t x = window_start(p_.mode, place.x, seen, p_.W, p_.width, wide);
      down_.whole(y, tall / p_.height, p_.height, p_.H);
      across_.whole(x, wide / p_.width, p_.width, p_.W);
    }
    const int64_t n = across_.high - across_.low;
    if (n <= 0) return;
    R* const line = line_buffer_.at_least(n);
    R* const cells = cell_buffer_.at_least(p_.width);
    const int64_t first = ((b * p_.G + g) * p_.S + s) * p_.C * p_.height;
    for (int64_t i = 0; i < p_.height; ++i) {
      const Cell<R>& cell = down_[i];
      const int64_t from = cell.start < top_ ? top_ : cell.start, to = least(cell.start + cell.count, bottom_);
      if (from >= to) continue;
      for (int64_t c = 0; c < p_.C; ++c) {
        read_cells(p_, p_.grad_out, (first + c * p_.height + i) * p_.width, cells, p_.width);
        spread(cells, line, n);
        for (int64_t y = from; y < to; ++y) {
          R* const row = band_ + c * plane_ + (y - top_) * p_.W + across_.low;
          add_scaled(row, line, cell.weights[y - cell.start], n);
        }
      }
    }
  }

  // The same for even cells; first: the row of dout that is theirs.
  void even(int64_t first) {
    if (even_.nothing_seen(p_)) return;
    const EvenAxis<R>&down = even_.down, &across = even_.across;
    constexpr int L = LANES<R>;
    const EvenSpan span(across, p_.width, p_.W);
    const int64_t vectors = ceil_div(p_.width, L);
    R* const line = line_buffer_.at_least(span.length);
    R* const cells = cell_buffer_.at_least((vectors + 1) * L) + L;
    memset(line, 0, span.length * sizeof(R));
    for (int64_t x = -L; x < vectors * L; ++x) cells[x] = R(0);
    for (int64_t c = 0; c < p_.C; ++c) {
      R* const plane = band_ + c * plane_ + span.first;
      for (int64_t i = 0; i < p_.height; ++i) {
        const auto [from, count, t] = down.seen(i, p_.H);
        const int64_t begin = from < top_ ? top_ : from, end = least(from + count, bottom_);
        if (begin >= end) continue;
        read_cells(p_, p_.grad_out, (first + c * p_.height + i) * p_.width, cells, p_.width);
        by_size(across, [&]<int SIZE, bool MORE>() {
          spread_even<SIZE, MORE>(cells, across.weights, line + span.window, vectors);
        });
        for (int64_t y = begin; y < end; ++y) {
          add_scaled(plane + (y - top_) * p_.W, line + span.pad, down.weights[t + y - from], span.n);
        }
      }
    }
  }

  // line[x] = sum over j of wx(j, x) * cells[j]
  void spread(const R* cells, R* line, int64_t n) {
    memset(line, 0, n * sizeof(R));
    for (int64_t j = 0; j < p_.width; ++j) {
      const Cell<R>& cell = across_[j];
      R* const at = line + cell.start - across_.low;
      for (int64_t t = 0; t < cell.count; ++t) at[t] += cell.weights[t] * cells[j];
    }
  }
};

template <class S, class R>
class Points {
 public:
  explicit Points(const GlimpseBackward& p) : p_(p) {}

  // Scale s of glimpse (b, g): its share of dx, dy and dk, in pixels.
  void operator()(int64_t b, int64_t g, int64_t s, double* parts) {
    parts[0] = parts[1] = parts[2] = 0;
    const Place<R> place(p_, b, g, s);
    if (!place.valid) return;
    down_.smooth(p_, place.centre_y(p_), place.k, p_.height, p_.H, 0, p_.height, true);
    across_.smooth(p_, place.centre_x(p_), place.k, p_.width, p_.W, 0, p_.width, true);
    if (down_.high == 0 || across_.high == 0) return;
    const Plane<S> plane(p_, b);
    rows_.span(plane, across_);
    const int64_t columns = ceil_div(p_.width, L) * L, first = ((b * p_.G + g) * p_.S + s) * p_.C * p_.height;
    R* const read = read_buffer_.at_least(L * columns);
    R* const turned = turned_buffer_.at_least(columns * L);
    for (int64_t i = 0; i < p_.height; i += L) {
      const int lanes = int(least(L, p_.height - i));
      for (int64_t group = 0; group < plane.groups; ++group) {
        for (int64_t c = 0; c < plane.together; ++c) {
          // dout, turned: [j][cell row]; cell rows beyond the last have none.
          memset(read, 0, L * columns * sizeof(R));
          const R* pointers[L];
          for (int lane = 0; lane < L; ++lane) {
            pointers[lane] = read + lane * columns;
            if (lane >= lanes) continue;
            const int64_t row = first + (group + c) * p_.height + i + lane;
            read_cells(p_, p_.grad_out, row * p_.width, read + lane * columns, p_.width);
          }
          transpose(pointers, columns, turned, L);
          along_x(plane, group, c, i, lanes, turned, parts);
          along_y(plane, group, c, i, lanes, turned, parts);
        }
      }
    }
  }

 private:
  static constexpr int L = LANES<R>;
  const GlimpseBackward& p_;
  Axis<R> down_, across_;
  Rows<S, R> rows_;
  Buffer<R> read_buffer_, turned_buffer_, step_buffer_, growth_buffer_;

  static double sum(const Vec<R>& v, int lanes) {
    double total = 0;
    for (int lane = 0; lane < lanes; ++lane) total += double(v[lane]);
    return total;
  }
  Vec<R> column(int64_t x, const Plane<S>& plane, int64_t c) const {
    return x < 0 ? Vec<R>{} : load_vector(rows_.at(x * plane.together + c));
  }

  void along_x(const Plane<S>& plane, int64_t group, int64_t c, int64_t i, int lanes, const R* dout, double* parts) {
    for (int lane = 0; lane < lanes; ++lane) {
      const Cell<R>& cell = down_[i + lane];
      rows_.blend_row(plane, group, lane, cell.start, cell.count, cell.weights);
    }
    rows_.turn(lanes);
    Vec<R> dx = {}, dk = {};
    for (int64_t j = 0; j < p_.width; ++j) {
      const Cell<R>& cell = across_[j];
      const Vec<R> upper = column(cell.upper, plane, c), d = load_vector(dout + j * L);
      const Vec<R> step = upper - column(cell.lower, plane, c);
      Vec<R> growth = step * cell.m;
      if (across_.shrinks) growth += upper - rows_.reduce(cell, plane.together, c);
      dx += d * step;
      dk += d * growth;
    }
    parts[0] += double(across_.slope) * sum(dx, lanes);
    parts[2] += double(across_.slope) * sum(dk, lanes);
  }

  void along_y(const Plane<S>& plane, int64_t group, int64_t c, int64_t i, int lanes, const R* dout, double* parts) {
    // The values at the upper edges less those at the lower, and less the cells' own.
    R* const steps = step_buffer_.at_least(p_.width * L);
    R* const growths = growth_buffer_.at_least(p_.width * L);
    const R one = 1;
    Vec<R> m = {};
    for (int lane = 0; lane < lanes; ++lane) {
      edge_row(plane, group, lane, down_[i + lane].upper, &one);
      m[lane] = down_[i + lane].m;
    }
    rows_.turn(lanes);
    for (int64_t j = 0; j < p_.width; ++j) store_vector(steps + j * L, rows_.reduce(across_[j], plane.together, c));
    if (down_.shrinks) {
      for (int lane = 0; lane < lanes; ++lane) {
        const Cell<R>& cell = down_[i + lane];
        rows_.blend_row(plane, group, lane, cell.start, cell.count, cell.weights);
      }
      rows_.turn(lanes);
      for (int64_t j = 0; j < p_.width; ++j) {
        store_vector(growths + j * L, load_vector(steps + j * L) - rows_.reduce(across_[j], plane.together, c));
      }
    }
    for (int lane = 0; lane < lanes; ++lane) edge_row(plane, group, lane, down_[i + lane].lower, &one);
    rows_.turn(lanes);
    Vec<R> dy = {}, dk = {};
    for (int64_t j = 0; j < p_.width; ++j) {
      const Vec<R> step = load_vector(steps + j * L) - rows_.reduce(across_[j], plane.together, c), d = load_vector(dout + j * L);
      Vec<R> growth = step * m;
      if (down_.shrinks) growth += load_vector(growths + j * L);
      dy += d * step;
      dk += d * growth;
    }
    parts[1] += double(down_.slope) * sum(dy, lanes);
    parts[2] += double(down_.slope) * sum(dk, lanes);
  }

  void edge_row(const Plane<S>& plane, int64_t group, int lane, int64_t y, const R* one) {
    rows_.blend_row(plane, group, lane, y < 0 ? 0 : y, y < 0 ? 0 : 1, one);
  }
};

template <class S, class R>
void image_gradient(const GlimpseBackward& p) {
  const int64_t row = p.C * p.W * int64_t(sizeof(R));
  int64_t band = least(p.H, row > 0 ? BAND_BYTES / row : p.H);
  band = band < 16 ? least(p.H, 16) : band;
  // A few images must still keep every thread at work.
  if (p.B * ceil_div(p.H, band) < 4 * p.threads) band = least(band, ceil_div(p.H * p.B, 4 * int64_t(p.threads)));
  band = band < 1 ? 1 : band;
  const int64_t bands = ceil_div(p.H, band);
#pragma omp parallel num_threads(p.B * p.H * row < 65536 && threads_for(p) == 1 ? 1 : p.threads)
  {
    Image<S, R> image(p);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < p.B * bands; ++unit) {
      const int64_t top = unit % bands * band;
      image(unit / bands, top, least(top + band, p.H));
    }
  }
}

template <class S, class R>
void point_gradients(const GlimpseBackward& p) {
  const int64_t glimpses = p.B * p.G;
#pragma omp parallel num_threads(threads_for(p))
  {
    Points<S, R> points(p);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < glimpses * p.S; ++unit) {
      const int64_t s = unit % p.S, g = unit / p.S % p.G, b = unit / p.S / p.G;
      points(b, g, s, p.parts + unit * 3);
    }
  }
  for (int64_t at = 0; at < glimpses; ++at) {
    double dx = 0, dy = 0, dzoom = 0, k = p.base;
    for (int64_t s = 0; s < p.S; ++s, k *= p.factor) {
      const double* parts = p.parts + (at * p.S + s) * 3;
      dx += parts[0];
      dy += parts[1];
      dzoom += parts[2] * k;
    }
    R* const loc = static_cast<R*>(p.grad_loc) + at * 2;
    loc[0] = R(dx * (double(p.W) / 2));
    loc[1] = R(dy * (double(p.H) / 2));
    if (p.grad_zoom) static_cast<R*>(p.grad_zoom)[at] = R(dzoom);
  }
}

}  // namespace

void glimpse_backward(const GlimpseBackward& p) {
  by_pixel(p, [&]<class S, class R>() {
    if constexpr (sizeof(S) != 1) {
      if (p.grad_image) image_gradient<S, R>(p);
    }
    if (p.grad_loc) point_gradients<S, R>(p);
  });
}

}  // namespace RECATTN_ISA
}  // namespace recattn
