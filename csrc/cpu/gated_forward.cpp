// The forward of rnn, lstm and gru on the CPU. Per step and row, with q = weight_hh h + bias_hh:
//   rnn:  h = act(x + q)
//   lstm: i, f, o = sigmoid(x + q), g = tanh(x + q);  c = f * c + i * g;  h = o * tanh(c)
//   gru:  r, z = sigmoid(x + q), n = tanh(x_n + r * q_n);  h = (1 - z) * n + z * h
//
// A tile of the product holds every gate of its units: the gates are computed from it while it is in the first-level
// cache, and no tensor of gates is passed over. A layer norm needs a row's whole product before any gate, and so few
// rows that packing the weights would not pay are products of their own: there the product goes to memory first.
#include <optional>

#include "gated_cells.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

template <Cell C, class R>
class Forward {
  static constexpr int G = gates_of(C), KEPT = kept_of(C);
  static constexpr bool BEFORE = C == Cell::gru_before;
  using First = Panels<BEFORE ? 2 : G, R>;  // the product of h
  using Second = Panels<1, R>;              // gru_before: that of r * h
  static constexpr int64_t DIRECT_ROWS = 4;

 public:
  explicit Forward(const GatedForward& p)
      : p(p), threads(threads_for(p)), direct(!BEFORE && p.T * p.B <= DIRECT_ROWS),
        by_rows(direct || p.ln_weight || p.ln_c_weight), width(by_rows ? ceil_div(p.H, 64) * 64 : 4 * LANES<R>),
        tiles(!direct && in_tiles<R>(p)), weight_bytes(direct ? 0 : First::bytes(p.H, p.H, tiles)),
        second_bytes(BEFORE ? Second::bytes(p.H, p.H, tiles) : 0), parts_size(tiles ? Rows<R>::STRIPS * strip_size(p.H) : 0),
        apart(!direct && rows_apart(p, weight_bytes + second_bytes, threads, tiles)),
        memory(Workspace::bytes<char>(weight_bytes) + Workspace::bytes<char>(second_bytes) + Workspace::bytes<R>(p.H) +
               Workspace::bytes<R>(G * p.H) + Workspace::bytes<R>(p.B * p.H) +
               Workspace::bytes<R>(by_rows ? p.B * G * p.H : 0) + Workspace::bytes<R>(BEFORE ? 3 * p.B * p.H : 0) +
               threads * (Workspace::bytes<R>((G + KEPT + 1) * width) + Workspace::bytes<Bits>(parts_size))),
        packed(reinterpret_cast<R*>(memory.template take<char>(weight_bytes))),
        packed_second(reinterpret_cast<R*>(memory.template take<char>(second_bytes))),
        zeros(memory.template take<R>(p.H)), bias(memory.template take<R>(G * p.H)),
        other_h(memory.template take<R>(p.B * p.H)), products(memory.template take<R>(by_rows ? p.B * G * p.H : 0)),
        gates_before(memory.template take<R>(BEFORE ? 2 * p.B * p.H : 0)),
        reset_h(memory.template take<R>(BEFORE ? p.B * p.H : 0)),
        scratch(memory.template take<R>(threads * (Workspace::bytes<R>((G + KEPT + 1) * width) / sizeof(R)))),
        parts(memory.template take<Bits>(threads * parts_size)), mix_h(zoneout_h(p)), mix_c(zoneout_c(p)) {
    memset(zeros, 0, p.H * sizeof(R));
    copy_or_zero(bias, p.bias_hh, 0, G * p.H);
    const R* w = static_cast<const R*>(p.weight_hh);
    first = {w, p.H, 1, p.H, p.H, packed, tiles};
    second = {w + 2 * p.H * p.H, p.H, 1, p.H, p.H, packed_second, tiles};
  }

  void run() {
    on_threads(threads, [this](const Member& member) { run(member); });
  }

 private:
  void run(const Member& member) {
    const int64_t thread = member.thread, count = member.threads;
    Ahead ahead;
    Local local = {scratch + thread * (Workspace::bytes<R>((G + KEPT + 1) * width) / int64_t(sizeof(R))),
                   parts + thread * parts_size, ahead, {}};
    std::optional<TileUnits> units;
    if (tiles) units.emplace();
    const int64_t b0 = rows_from(p, thread, count), b1 = rows_from(p, thread + 1, count);
    for (int64_t b = b0; b < b1; ++b) start_row(b);
    if constexpr (BEFORE) {
      pack(member, seen, zeros, first, second);
    } else if (!direct) {
      pack(member, seen, zeros, first);
    }
    member.meet();
    Share share = {0, p.B, part(first.count(), thread, count), part(first.count(), thread + 1, count)};
    Share share2 = {0, p.B, part(second.count(), thread, count), part(second.count(), thread + 1, count)};
    if (apart) share = {b0, b1, 0, first.count()}, share2 = {b0, b1, 0, second.count()};
    for (int64_t step = 0; step < p.T; ++step) {
      const int64_t t = p.reverse ? p.T - 1 - step : step;
      if (direct) {
        dots(t, part(G * p.H, thread, count), part(G * p.H, thread + 1, count));
      } else {
        product<false>(first, t, share, local);
      }
      if constexpr (BEFORE) {
        if (!apart) member.meet();
        product<true>(second, t, share2, local);
      }
      if (by_rows) {
        if (!apart) member.meet();
        for (int64_t b = b0; b < b1; ++b) {
          if (t < steps_of(p, b)) whole_row(t, b, local);
        }
      }
      if (!apart) member.meet();
    }
  }

  struct Local {
    R* memory;    // (G + KEPT + 1) rows of `width`
    Bits* parts;  // of a product's rows
    Ahead& ahead;
    Sweep sweep;
  };

  // Zeros past the row's length, in output and in what is kept, and the states of a row that takes no step.
  void start_row(int64_t b) {
    const int64_t steps = steps_of(p, b);
    const auto clear = [&](void* tensor, int64_t values, int64_t t) {
      if (tensor) memset(kept(tensor, values, t, b), 0, values * p.H * sizeof(R));
    };
    for (int64_t t = steps; t < p.T && !p.starts; ++t) {
      memset(place(p, p.output, t, b), 0, p.H * size_of(p.dtype));
      clear(p.gates, KEPT, t), clear(p.cells, 1, t), clear(p.normed, G, t);
      if (p.rstd) static_cast<R*>(p.rstd)[row_of(p, t, b)] = 0;
    }
    if (steps > 0) return;
    copy_or_zero(static_cast<R*>(p.h_n) + b * p.H, p.h0, b * p.H, p.H);
    if (C == Cell::lstm) copy_or_zero(static_cast<R*>(p.c_n) + b * p.H, p.c0, b * p.H, p.H);
  }

  const R* initial(const void* state, int64_t b) const {
    return static_cast<const R*>(state) + b * p.H;
  }

  // A row's states lie in h_n and other_h in turn, the last one in h_n.
  R* state_after(int64_t step, int64_t b) const {
    return ((steps_of(p, b) - 1 - step) % 2 == 0 ? static_cast<R*>(p.h_n) : other_h) + b * p.H;
  }
  const R* h_before(int64_t t, int64_t b) const {
    const int64_t step = taken_before(p, t, b);
    if (resets(p, t, b) || (step == 0 && !p.h0)) return zeros;
    return step == 0 ? initial(p.h0, b) : state_after(step - 1, b);
  }
  const R* c_before(int64_t t, int64_t b) const {
    const bool at_start = taken_before(p, t, b) == 0;
    if (resets(p, t, b) || (at_start && !p.c0)) return zeros;
    return at_start ? initial(p.c0, b) : static_cast<const R*>(p.c_n) + b * p.H;
  }

  template <bool SECOND, class Weights>
  void product(const Weights& weights, int64_t t, const Share& share, Local& local) {
    // Two panels at once where one is as wide as a vector: a line of the cache is half of what memory brings.
    constexpr int MOST = Rows<R>::MOST, PANELS = Weights::GROUPS == 1 ? 2 : 1;
    constexpr int64_t UNITS = PANELS * Weights::UNITS, WIDTH = PANELS * Weights::WIDTH;
    constexpr int64_t V_STRIDE = PANELS * LANES<R>;
    alignas(64) R sums[MOST * WIDTH];
    Rows<R> rows;
    rows.parts = local.parts;
    int64_t b_of[MOST], b = share.b0;
    while (b < share.b1) {
      const int64_t b_first = b;
      int64_t& n = rows.n = 0;
      for (; b < share.b1 && n < MOST; ++b) {
        if (t >= steps_of(p, b)) continue;
        rows.row[n] = SECOND ? reset_h + b * p.H : h_before(t, b);
        b_of[n++] = b;
      }
      if (weights.tiles) rows.split(p.H);
      if (n == 0) continue;
      local.sweep.start(share.panel0, share.panel1, PANELS);
      for (int64_t i, next; (i = local.sweep.next(next)) >= 0;) {
        const int64_t j = i * Weights::UNITS, end = least(i + PANELS, share.panel1);
        const int64_t units = least(end * Weights::UNITS, p.H) - j;
        if (by_rows) {
          local.ahead.clear();
        } else if (next >= 0) {
          look_ahead(t, b_first, b, next * Weights::UNITS, UNITS, local.ahead);
        } else {  // the next step begins where this one ends
          look_ahead(p.reverse ? t - 1 : t + 1, b_first, b, j, UNITS, local.ahead);
        }
        weights.product(rows, i, end, sums, WIDTH, V_STRIDE, local.ahead);
        for (int64_t r = 0; r < n; ++r) {
          const R* q = sums + r * WIDTH;
          if (units == UNITS) {
            finish<SECOND>(t, b_of[r], j, UNITS, q, UNITS, local);
          } else {
            finish<SECOND>(t, b_of[r], j, units, q, UNITS, local);
          }
        }
      }
    }
  }

  // What the rows b0 to b1 will read and write at time t of n units from j on: lines too far apart for the hardware to
  // fetch ahead.
  void look_ahead(int64_t t, int64_t b0, int64_t b1, int64_t j, int64_t n, Ahead& ahead) const {
    ahead.clear();
    if (t < 0 || t >= p.T) return;
    const auto add = [&](const void* from, int64_t stride, int64_t size) {
      ahead.add(reinterpret_cast<uintptr_t>(from), stride * size, least(n, p.H - j) * size, b1 - b0);
    };
    for (int g = 0; g < G; ++g) add(place(p, p.x, t, b0, g * p.H + j), p.x.stride_b, size_of(p.dtype));
    for (int g = 0; g < KEPT && p.gates; ++g) add(kept(p.gates, KEPT, t, b0) + g * p.H + j, KEPT * p.H, sizeof(R));
    if (p.cells) add(kept(p.cells, 1, t, b0) + j, p.H, sizeof(R));
    add(place(p, p.output, t, b0, j), p.output.stride_b, size_of(p.dtype));
  }

  R* kept(void* tensor, int64_t values, int64_t t, int64_t b) const {
    return static_cast<R*>(tensor) + row_of(p, t, b) * values * p.H;
  }

  // q[gate * stride + i]: units j to j + n of weight_hh h.
  template <bool SECOND>
  RECATTN_FN void finish(int64_t t, int64_t b, int64_t j, int64_t n, const R* q, int64_t stride, const Local& local) {
    if constexpr (BEFORE) {
      SECOND ? second_gate(t, b, j, n, q, local) : first_gates(t, b, j, n, q, stride, local);
    } else if (by_rows) {
      for (int g = 0; g < G; ++g) memcpy(products + (b * G + g) * p.H + j, q + g * stride, n * sizeof(R));
    } else {
      cell(t, b, j, n, q, stride, local);
    }
  }

  // q = weight_hh h without packing: a row of the weights times a row of the states, for rows begin to end of them.
  void dots(int64_t t, int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end;) {
      const int64_t rows = end - m >= 8 ? 8 : 1;
      const R* w = static_cast<const R*>(p.weight_hh) + m * p.H;
      for (int64_t b = 0; b < p.B; ++b) {
        if (t >= steps_of(p, b)) continue;
        R* to = products + b * G * p.H + m;
        rows == 8 ? dot<8>(w, h_before(t, b), to) : dot<1>(w, h_before(t, b), to);
      }
      m += rows;
    }
  }

  template <int ROWS>
  void dot(const R* w, const R* h, R* to) const {
    Vec<R> sums[ROWS] = {}, a, b;
    int64_t k = 0;
    for (; k + LANES<R> <= p.H; k += LANES<R>) {
      memcpy(&b, h + k, VECTOR_BYTES);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        memcpy(&a, w + r * p.H + k, VECTOR_BYTES);
        sums[r] += a * b;
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      R sum = 0;
      for (int64_t i = k; i < p.H; ++i) sum += w[r * p.H + i] * h[i];
      for (int lane = 0; lane < LANES<R>; ++lane) sum += sums[r][lane];
      to[r] = sum;
    }
  }

  // Layer norm of a row's product where there is one, then all of its units at once.
  void whole_row(int64_t t, int64_t b, const Local& local) {
    if constexpr (!BEFORE) {
      R* q = products + b * G * p.H;
      if (p.ln_weight) {
        const R *weight = static_cast<const R*>(p.ln_weight), *ln_bias = static_cast<const R*>(p.ln_bias);
        const R rstd = normalise(q, q, G * p.H);
        if (p.normed) {
          memcpy(kept(p.normed, G, t, b), q, G * p.H * sizeof(R));
          static_cast<R*>(p.rstd)[row_of(p, t, b)] = rstd;
        }
        RECATTN_INDEPENDENT
        for (int64_t i = 0; i < G * p.H; ++i) q[i] = q[i] * weight[i] + ln_bias[i];
      }
      cell(t, b, 0, p.H, q, p.H, local);
    }
  }

  RECATTN_FN void inputs(int64_t t, int64_t b, int64_t j, int64_t n, const Local& local, const R** x) const {
    for (int g = 0; g < G; ++g) {
      x[g] = widened(p.dtype, place(p, p.x, t, b, g * p.H + j), local.memory + g * width, n);
    }
  }
  RECATTN_FN void outputs(int64_t t, int64_t b, int64_t j, const Local& local, R** gates) const {
    for (int g = 0; g < KEPT; ++g) {
      gates[g] = p.gates ? kept(p.gates, KEPT, t, b) + g * p.H + j : local.memory + (G + g) * width;
    }
  }

  RECATTN_FN void cell(int64_t t, int64_t b, int64_t j, int64_t n, const R* q, int64_t stride, const Local& local) {
    const R* x[G];
    R* gates[KEPT];
    inputs(t, b, j, n, local, x);
    outputs(t, b, j, local, gates);
    const R* h = h_before(t, b) + j;
    R* next = state_after(taken_before(p, t, b), b) + j;
    if constexpr (C == Cell::rnn_tanh || C == Cell::rnn_relu) {
      rnn_row<C>(x[0], q, bias + j, next, n);
      if (p.gates) memcpy(gates[0], next, n * sizeof(R));
    } else if constexpr (C == Cell::lstm) {
      R *c_new = local.memory + (G + KEPT) * width, *c_next = static_cast<R*>(p.c_n) + b * p.H + j;
      const R* c = c_before(t, b) + j;
      lstm_row(x, q, stride, bias + j, p.H, c, gates, c_new, n);
      squash(gates[3], c_new, next, n);
      mix_c.mix(t, b, j, c, c_new, n);
      memcpy(c_next, c_new, n * sizeof(R));
      if (p.cells) memcpy(kept(p.cells, 1, t, b) + j, c_new, n * sizeof(R));
    } else if constexpr (C == Cell::gru) {
      gru_row(x, q, stride, bias + j, p.H, h, gates, next, n);
    }
    leave(t, b, j, n, h, next);
  }

  RECATTN_FN void leave(int64_t t, int64_t b, int64_t j, int64_t n, const R* h, R* next) const {
    mix_h.mix(t, b, j, h, next, n);
    narrowed(p.dtype, place(p, p.output, t, b, j), next, n);
  }

  // h = o * tanh(c), with layer norm o * tanh(LN(c)), where n is the whole row.
  RECATTN_FN void squash(const R* o, const R* c, R* h, int64_t n) const {
    if (p.ln_c_weight) {
      const R *weight = static_cast<const R*>(p.ln_c_weight), *ln_bias = static_cast<const R*>(p.ln_c_bias);
      normalise(c, h, n);
      RECATTN_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) h[i] = o[i] * tanh_(h[i] * weight[i] + ln_bias[i]);
    } else {
      for (Lanes<R> at = {0, n}; at.i < n; at.i += LANES<R>) at.store(h, at.load(o) * tanh_(at.load(c)));
    }
  }

  // gru_before (Cho et al., 2014): r, z = sigmoid(x + q), and r * h for the product that follows.
  RECATTN_FN void first_gates(int64_t t, int64_t b, int64_t j, int64_t n, const R* q, int64_t stride,
                              const Local& local) {
    if constexpr (BEFORE) {
      const R* x[G];
      inputs(t, b, j, n, local, x);
      const R *xr = x[0], *xz = x[1], *h = h_before(t, b) + j, *bias_r = bias + j, *bias_z = bias + p.H + j;
      R* r = (p.gates ? kept(p.gates, KEPT, t, b) : gates_before + b * 2 * p.H) + j;
      R *z = r + p.H, *to = reset_h + b * p.H + j;
      RECATTN_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        r[i] = sigmoid(xr[i] + (q[i] + bias_r[i]));
        z[i] = sigmoid(xz[i] + (q[stride + i] + bias_z[i]));
        to[i] = r[i] * h[i];
      }
    }
  }

  // n = tanh(x_n + q_n) with q of r * h;  h = (1 - z) * n + z * h
  RECATTN_FN void second_gate(int64_t t, int64_t b, int64_t j, int64_t n, const R* q, const Local& local) {
    if constexpr (BEFORE) {
      const R* x = widened(p.dtype, place(p, p.x, t, b, 2 * p.H + j), local.memory, n);
      const R *h = h_before(t, b) + j, *bias_n = bias + 2 * p.H + j;
      const R* z = (p.gates ? kept(p.gates, KEPT, t, b) : gates_before + b * 2 * p.H) + p.H + j;
      R* candidate = p.gates ? kept(p.gates, KEPT, t, b) + 2 * p.H + j : local.memory + G * width;
      R* next = state_after(taken_before(p, t, b), b) + j;
      RECATTN_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) {
        candidate[i] = tanh_(x[i] + (q[i] + bias_n[i]));
        next[i] = gru_state(z[i], candidate[i], h[i]);
      }
      leave(t, b, j, n, h, next);
    }
  }

  const GatedForward& p;
  const int threads;
  const bool direct, by_rows;  // without packing; whole rows of gates
  const int64_t width;
  const bool tiles;
  const int64_t weight_bytes, second_bytes, parts_size;
  const bool apart;
  Workspace memory;
  R *const packed, *const packed_second, *const zeros, *const bias, *const other_h, *const products,
      *const gates_before, *const reset_h, *const scratch;
  Bits* const parts;
  SeenByAll seen;
  const Zoneout mix_h, mix_c;
  First first;
  Second second;
};

}  // namespace

void gated_forward(const GatedForward& p) {
  if (p.B * p.H == 0) return;
  by_cell(p, [&]<Cell C, class R>() { Forward<C, R>(p).run(); });
}

}  // namespace RECATTN_ISA
}  // namespace recattn
