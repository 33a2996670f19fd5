// The cells of every glimpse:  out[i][j] = sum over y of wy(i, y) * sum over x of wx(j, x) * I[y][x]
//
// Rows first: the image's rows, which are contiguous, are blended to one a cell row. LANES of those are turned, so that
// the sums across have a cell row in each lane. Even cells are summed across as they lie.
#include "glimpse_even.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

template <class S, class R>
class Smooth {
 public:
  explicit Smooth(const GlimpseForward& p) : p_(p) {}

  // Cell rows i to i_end, at most LANES of them, of scale s of glimpse (b, g); at: of the glimpse's first cell in out.
  void operator()(int64_t b, int64_t g, int64_t s, int64_t i, int64_t i_end, int64_t at) {
    const Place<R> place(p_, b, g, s);
    const int64_t columns = ceil_div(p_.width, L) * L;
    R* cells = cell_buffer_.at_least(columns * L);
    R* found = found_buffer_.at_least(L * columns);
    if (!place.valid) return fill(R(__builtin_nan("")), found, i, i_end, at);
    const Plane<S> plane(p_, b);
    if (even_.set(p_, place) && plane.together == 1) return even(plane, found, i, i_end, at);
    down_.smooth(p_, place.centre_y(p_), place.k, p_.height, p_.H, i, i_end, false);
    across_.smooth(p_, place.centre_x(p_), place.k, p_.width, p_.W, 0, p_.width, false);
    if (down_.high == 0 || across_.high == 0) return fill(R(0), found, i, i_end, at);
    const int lanes = int(i_end - i);
    rows_.span(plane, across_);
    for (int64_t group = 0; group < plane.groups; ++group) {
      for (int lane = 0; lane < lanes; ++lane) {
        const Cell<R>& cell = down_[i + lane];
        rows_.blend_row(plane, group, lane, cell.start, cell.count, cell.weights);
      }
      rows_.turn(lanes);
      for (int64_t c = 0; c < plane.together; ++c) {
        for (int64_t j = 0; j < p_.width; ++j) {
          store_vector(cells + j * L, rows_.reduce(across_[j], plane.together, c));
        }
        for (int64_t j = 0; j < columns; j += L) {
          const R* turned[L];
          for (int lane = 0; lane < L; ++lane) turned[lane] = cells + (j + lane < p_.width ? j + lane : 0) * L;
          transpose(turned, L, found + j, columns);
        }
        const int64_t channel = group + c;  // there is one group, or one channel in each
        for (int lane = 0; lane < lanes; ++lane) {
          write_cells(p_, p_.out, at + (channel * p_.height + i + lane) * p_.width, found + lane * columns, p_.width);
        }
      }
    }
  }

 private:
  static constexpr int L = LANES<R>;
  const GlimpseForward& p_;
  Axis<R> down_, across_;
  EvenAxes<R> even_;
  Rows<S, R> rows_;
  Buffer<R> cell_buffer_, found_buffer_, line_buffer_;

  void even(const Plane<S>& plane, R* row, int64_t i, int64_t i_end, int64_t at) {
    if (even_.nothing_seen(p_)) return fill(R(0), row, i, i_end, at);
    const EvenAxis<R>&down = even_.down, &across = even_.across;
    const EvenSpan span(across, p_.width, p_.W);
    R* const lines = line_buffer_.at_least(L * span.length);
    for (int64_t y = i; y < i_end; ++y) span.clear(lines + (y - i) * span.length);
    for (int64_t c = 0; c < p_.C; ++c) {
      const S* const from = plane.data + c * plane.apart + span.first * plane.step;
      // All lines before any is read: none is long enough for its stores to have settled.
      for (int64_t y = i; y < i_end; ++y) {
        const auto [first, count, t] = down.seen(y, p_.H);
        R* const line = lines + (y - i) * span.length + span.pad;
        blend(from + first * plane.row, plane.row, plane.step, down.weights + t, count, line, span.n);
      }
      by_size(across, [&]<int SIZE, bool MORE>() {
        for (int64_t y = i; y < i_end; ++y) {
          const R* const line = lines + (y - i) * span.length + span.window;
          reduce_even<SIZE, MORE>(line, across.weights, row, ceil_div(p_.width, L));
          write_cells(p_, p_.out, at + (c * p_.height + y) * p_.width, row, p_.width);
        }
      });
    }
  }

  void fill(R value, R* row, int64_t i, int64_t i_end, int64_t at) {
    for (int64_t j = 0; j < p_.width; ++j) row[j] = value;
    for (int64_t c = 0; c < p_.C; ++c) {
      for (int64_t y = i; y < i_end; ++y) write_cells(p_, p_.out, at + (c * p_.height + y) * p_.width, row, p_.width);
    }
  }
};

// The same of the compatible modes: sums of whole pixels row by row, divided at the end.
template <class S, class R>
class Whole {
 public:
  explicit Whole(const GlimpseForward& p) : p_(p) {}

  void operator()(int64_t b, int64_t g, int64_t s, int64_t i, int64_t i_end, int64_t at) {
    const Place<R> place(p_, b, g, s);
    R* row = buffer_.at_least(p_.width);
    const int64_t tall = window_of(p_.height, p_.factor, s), wide = window_of(p_.width, p_.factor, s);
    const int64_t down = tall / p_.height, across = wide / p_.width;
    const bool square = p_.mode == GlimpseMode::kevinzakka;  // it takes the image's height for both axes
    int64_t top = 0, left = 0;
    if (place.valid) {
      top = window_start(p_.mode, place.y, p_.H, p_.H, p_.height, tall);
      left = window_start(p_.mode, place.x, square ? p_.H : p_.W, p_.W, p_.width, wide);
    }
    for (int64_t c = 0; c < p_.C; ++c) {
      const S* plane = static_cast<const S*>(p_.image) + b * p_.image_b + c * p_.image_c;
      for (int64_t y = i; y < i_end; ++y) {
        for (int64_t x = 0; x < p_.width; ++x) {
          R sum = 0;
          for (int64_t t = 0; t < down * across; ++t) {
            const int64_t py = top + y * down + t / across, px = left + x * across + t % across;
            const bool inside = py >= 0 && py < p_.H && px >= 0 && px < p_.W;
            const R value = inside ? as<R>(plane[py * p_.image_y + px * p_.image_x]) : R(0);
            sum = t == 0 ? value : sum + value;
          }
          row[x] = place.valid ? sum / R(down * across) : R(__builtin_nan(""));
        }
        write_cells(p_, p_.out, at + (c * p_.height + y) * p_.width, row, p_.width);
      }
    }
  }

 private:
  const GlimpseForward& p_;
  Buffer<R> buffer_;
};

template <template <class, class> class Kernel, class S, class R>
void run(const GlimpseForward& p) {
  const int64_t blocks = ceil_div(p.height, LANES<R>), units = p.B * p.G * p.S * blocks;
#pragma omp parallel num_threads(threads_for(p))
  {
    Kernel<S, R> kernel(p);
#pragma omp for schedule(dynamic, 8)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t glimpse = unit / blocks, block = unit % blocks, i = block * LANES<R>;
      const int64_t s = glimpse % p.S, g = glimpse / p.S % p.G, b = glimpse / p.S / p.G;
      kernel(b, g, s, i, least(i + LANES<R>, p.height), glimpse * p.C * p.height * p.width);
    }
  }
}

}  // namespace

void glimpse_forward(const GlimpseForward& p) {
  by_pixel(p, [&]<class S, class R>() {
    const bool smooth = p.mode == GlimpseMode::area || p.mode == GlimpseMode::bilinear;
    smooth ? run<Smooth, S, R>(p) : run<Whole, S, R>(p);
  });
}

}  // namespace RECATTN_ISA
}  // namespace recattn
