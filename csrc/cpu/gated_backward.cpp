// The backward of rnn, lstm and gru on the CPU. From the last step to the first, with flow = what later steps give:
//   dh = clip(dy + flow);  dgates = d(gates) * dh;  dx = dgates;  flow = weight_hh^T dgates + what goes past the gates
//
// dgates of a step are computed from the tile of the product with those of the step after, unit by unit, so that
// threads meet once a step. A layer norm needs whole rows: then they meet in between. The gradient of the weights is one
// product over all steps, after the scan.
#include <optional>

#include "gated_gradients.h"
#include "gated_weights.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

template <Cell C, class R>
class Backward {
  static constexpr int G = gates_of(C), KEPT = kept_of(C);
  static constexpr bool BEFORE = C == Cell::gru_before, LSTM = C == Cell::lstm;
  using Weights = Panels<1, R>;
  static constexpr int64_t GROUPS = 16, DIRECT_ROWS = 4, BUFFERS = 6;

 public:
  explicit Backward(const GatedBackward& p)
      : p(p), threads(threads_for(p)), by_rows(p.ln_weight || p.ln_c_weight),
        width(by_rows ? ceil_div(p.H, 64) * 64 : Weights::UNITS), K(BEFORE ? 2 * p.H : G * p.H),
        direct(p.T * p.B <= DIRECT_ROWS && p.H % Weights::UNITS == 0), tiles(!direct && in_tiles<R>(p)),
        groups(least(GROUPS, p.B)), weight_bytes(direct ? 0 : Weights::bytes(K, p.H, tiles)),
        second_bytes(direct || !BEFORE ? 0 : Weights::bytes(p.H, p.H, tiles)),
        parts_size(tiles ? Rows<R>::STRIPS * strip_size(K) : 0),
        sums_size(by_rows ? 2 * (G + 1) * p.H : 0), local_size(Workspace::bytes<R>(BUFFERS * width) / sizeof(R)),
        apart(rows_apart(p, weight_bytes + second_bytes, threads, tiles)),
        memory(Workspace::bytes<char>(weight_bytes) + Workspace::bytes<char>(second_bytes) + Workspace::bytes<R>(p.H) +
               2 * Workspace::bytes<R>(p.B * p.H) + Workspace::bytes<double>(groups * sums_size) +
               threads * (Workspace::bytes<R>(local_size) + Workspace::bytes<Bits>(parts_size))),
        packed(reinterpret_cast<R*>(memory.template take<char>(weight_bytes))),
        packed_second(reinterpret_cast<R*>(memory.template take<char>(second_bytes))),
        zeros(memory.template take<R>(p.H)), flow_h(own(p.grad_h0, p.B * p.H)), flow_c(own(p.grad_c0, p.B * p.H)),
        sums(memory.template take<double>(groups * sums_size)), scratch(memory.template take<R>(threads * local_size)),
        parts(memory.template take<Bits>(threads * parts_size)),
        grad_q(p.grad_q ? Sequence{p.grad_q, p.B * G * p.H, G * p.H} : p.grad_x), clip(R(p.grad_clip)),
        split_h(zoneout_h(p)), split_c(zoneout_c(p)) {
    memset(zeros, 0, p.H * sizeof(R));
    const R* w = static_cast<const R*>(p.weight_hh);
    first = columns(w, K, packed);
    second = columns(w + 2 * p.H * p.H, p.H, packed_second);
  }

  void run() {
    if (p.B > 0) on_threads(threads, [this](const Member& member) { scan(member); });
    if (by_rows) reduce_sums();
    // With a layer norm, bias_hh is added after it: its gradient is that of the layer norm's bias.
    R* grad_bias = by_rows ? nullptr : static_cast<R*>(p.grad_bias_hh);
    R* grad_weight = static_cast<R*>(p.grad_weight_hh);
    if (!grad_weight && !grad_bias) return;
    if constexpr (BEFORE) {
      R* weight_n = grad_weight ? grad_weight + 2 * p.H * p.H : nullptr;
      weight_product(0, 2 * p.H, false, grad_weight, grad_bias);
      weight_product(2 * p.H, p.H, true, weight_n, grad_bias ? grad_bias + 2 * p.H : nullptr);
    } else {
      weight_product(0, G * p.H, false, grad_weight, grad_bias);
    }
  }

 private:
  R* own(void* wanted, int64_t n) { return wanted ? static_cast<R*>(wanted) : memory.template take<R>(n); }

  Weights columns(const R* weights, int64_t rows, R* memory) const {
    if (direct) return {weights, 1, p.H, rows, p.H, nullptr, false, p.H, Weights::UNITS};
    return {weights, 1, p.H, rows, p.H, memory, tiles};
  }

  void scan(const Member& member) {
    const int64_t thread = member.thread, count = member.threads;
    Local local = {scratch + thread * local_size, parts + thread * parts_size, {}};
    std::optional<TileUnits> units;
    if (tiles) units.emplace();
    // Sums over rows are those of whole groups of rows, so that they do not depend on the number of threads.
    const auto rows = [&](int64_t i) {
      return by_rows ? part(p.B, part(groups, i, count), groups) : rows_from(p, i, count);
    };
    const int64_t b0 = rows(thread), b1 = rows(thread + 1);
    for (int64_t b = b0; b < b1; ++b) start_row(b);
    for (int64_t i = part(groups, thread, count) * sums_size; i < part(groups, thread + 1, count) * sums_size; ++i) {
      sums[i] = 0;
    }
    const int64_t panel0 = part(first.count(), thread, count), panel1 = part(first.count(), thread + 1, count);
    if constexpr (BEFORE) {
      pack(member, seen, zeros, first, second);
    } else {
      pack(member, seen, zeros, first);
    }
    member.meet();
    const Share share = apart ? Share{b0, b1, 0, first.count()} : Share{0, p.B, panel0, panel1};
    for (int64_t step = 0; step < p.T; ++step) {
      const int64_t t = p.reverse ? step : p.T - 1 - step;
      product<Phase::later>(first, t, share, local);
      if constexpr (BEFORE) {
        if (!apart) member.meet();
        product<Phase::reset>(second, t, share, local);
      }
      if (by_rows) {
        if (!apart) member.meet();
        for (int64_t b = b0; b < b1; ++b) {
          if (t < steps_of(p, b)) whole_row(t, b, local.memory);
        }
      }
      if (!apart) member.meet();
    }
    if (p.grad_h0) product<Phase::start>(first, 0, share, local);
  }

  // The gradients past the row's length, and those that come from the states after the last step.
  void start_row(int64_t b) {
    for (int64_t t = steps_of(p, b); t < p.T && !p.starts; ++t) {
      memset(place(p, p.grad_x, t, b), 0, G * p.H * size_of(p.dtype));
    }
    copy_or_zero(flow_h + b * p.H, p.grad_h_n, b * p.H, p.H);
    if (LSTM) copy_or_zero(flow_c + b * p.H, p.grad_c_n, b * p.H, p.H);
  }

  R* dq(int64_t t, int64_t b) const {
    return static_cast<R*>(grad_q.data) + offset(p, grad_q, t, b);
  }

  struct Local {
    R* memory;    // BUFFERS rows of `width`
    Bits* parts;  // of a product's rows
    Sweep sweep;
  };

  // later: with dq of the step after t; start: with dq of the first step; reset: gru_before's, with dn of step t.
  enum class Phase { later, start, reset };

  // The row of gradients that reach h at time t through the product; null where nothing does.
  template <Phase WHICH>
  const R* source(int64_t t, int64_t b) const {
    if (WHICH == Phase::reset) return dq(t, b) + 2 * p.H;
    const int64_t steps = steps_of(p, b);
    if (WHICH == Phase::start) {
      t = p.reverse ? steps - 1 : 0;
      return steps > 0 && !resets(p, t, b) ? dq(t, b) : nullptr;
    }
    const int64_t later = p.reverse ? t - 1 : t + 1;
    return later >= 0 && later < steps && !resets(p, later, b) ? dq(later, b) : nullptr;
  }

  template <Phase WHICH>
  void product(const Weights& weights, int64_t t, const Share& share, Local& local) {
    constexpr int MOST = Rows<R>::MOST;
    alignas(64) R result[MOST * Weights::WIDTH];
    NothingAhead nothing;
    Rows<R> rows;
    rows.parts = local.parts;
    int64_t b_of[MOST], b = share.b0;
    while (b < share.b1) {
      int64_t& n = rows.n = 0;
      for (; b < share.b1 && n < MOST; ++b) {
        if (WHICH != Phase::start && t >= steps_of(p, b)) continue;
        rows.row[n] = source<WHICH>(t, b);
        if (rows.row[n]) {
          b_of[n++] = b;
        } else {
          for (int64_t i = share.panel0; i < share.panel1; ++i) finish_panel<WHICH>(t, b, i, nullptr, local.memory);
        }
      }
      if (weights.tiles) rows.split(weights.K);
      if (n == 0) continue;
      local.sweep.start(share.panel0, share.panel1);
      for (int64_t i; (i = local.sweep.next()) >= 0;) {
        weights.product(rows, i, i + 1, result, Weights::WIDTH, LANES<R>, nothing);
        for (int64_t r = 0; r < n; ++r) finish_panel<WHICH>(t, b_of[r], i, result + r * Weights::WIDTH, local.memory);
      }
    }
  }

  template <Phase WHICH>
  void finish_panel(int64_t t, int64_t b, int64_t i, const R* sum, R* local) {
    const int64_t j = i * Weights::UNITS, n = p.H - j;
    if (n >= Weights::UNITS) {
      finish<WHICH>(t, b, j, Weights::UNITS, sum, local);
    } else {
      finish<WHICH>(t, b, j, n, sum, local);
    }
  }

  const R* kept(const void* tensor, int64_t values, int64_t t, int64_t b) const {
    return static_cast<const R*>(tensor) + row_of(p, t, b) * values * p.H;
  }

  // h[t-1], in R. At the first step and after a reset it is no row of output.
  RECATTN_FN const R* h_before(int64_t t, int64_t b, int64_t j, int64_t n, R* buffer) const {
    if (resets(p, t, b)) return zeros + j;
    if (taken_before(p, t, b) == 0) return p.h0 ? static_cast<const R*>(p.h0) + b * p.H + j : zeros + j;
    return widened(p.dtype, place(p, p.output, p.reverse ? t + 1 : t - 1, b, j), buffer, n);
  }
  const R* c_before(int64_t t, int64_t b, int64_t j) const {
    if (resets(p, t, b)) return zeros + j;
    if (taken_before(p, t, b) == 0) return p.c0 ? static_cast<const R*>(p.c0) + b * p.H + j : zeros + j;
    return kept(p.cells, 1, p.reverse ? t + 1 : t - 1, b) + j;
  }

  template <Phase WHICH>
  RECATTN_FN void finish(int64_t t, int64_t b, int64_t j, int64_t n, const R* sum, R* local) {
    R* flow = flow_h + b * p.H + j;
    if constexpr (WHICH == Phase::reset) {
      if constexpr (BEFORE) reset_gate(t, b, j, n, sum, local);
    } else {
      if (sum) {
        RECATTN_INDEPENDENT
        for (int64_t i = 0; i < n; ++i) flow[i] += sum[i];
      }
      if (WHICH == Phase::later && !by_rows) cell(t, b, j, n, local);
    }
  }

  // Units j to j + n of a step: dq, dx, and in flow_h and flow_c what goes past the product to the step before.
  RECATTN_FN void cell(int64_t t, int64_t b, int64_t j, int64_t n, R* local) {
    R *dh = local, *flow = flow_h + b * p.H + j, *to = dq(t, b) + j;
    const R* gates = p.gates ? kept(p.gates, KEPT, t, b) + j : nullptr;
    arrive(t, b, j, n, flow, dh, local + width);
    split_h.split(t, b, j, dh, flow, n);
    if constexpr (C == Cell::rnn_tanh || C == Cell::rnn_relu) {
      rnn_row<C>(gates ? gates : widened(p.dtype, place(p, p.output, t, b, j), local + width, n), dh, to, n);
    } else if constexpr (LSTM) {
      R *dc = local + width, *stays = local + 2 * width, *squashed = local + 3 * width, *flow_to = flow_c + b * p.H + j;
      const R* c = c_before(t, b, j);
      RECATTN_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) dc[i] = clamp_symmetric(flow_to[i], clip);
      split_c.split(t, b, j, dc, stays, n);
      squash(b, n, gates, c, dh, dc, squashed, local + 4 * width);
      lstm_row(gates, c, squashed, dh, dc, stays, flow_to, to, p.H, n);
      if (resets(p, t, b)) memset(flow_to, 0, n * sizeof(R));
    } else if constexpr (C == Cell::gru) {
      R* dn = local + 2 * width;
      gru_row(gates, h_before(t, b, j, n, local + width), dh, flow, dn, to, p.H, n);
      narrowed(p.dtype, place(p, p.grad_x, t, b, 2 * p.H + j), dn, n);
    } else {
      gru_before_row(gates, h_before(t, b, j, n, local + width), dh, flow, to, p.H, n);
    }
    if (p.grad_q) {
      for (int g = 0; g < (G == 3 ? 2 : G); ++g) {
        if (BEFORE && g == 0) continue;  // reset_gate()
        narrowed(p.dtype, place(p, p.grad_x, t, b, g * p.H + j), to + g * p.H, n);
      }
      if (BEFORE) narrowed(p.dtype, place(p, p.grad_x, t, b, 2 * p.H + j), to + 2 * p.H, n);
    }
    // gru_before still adds to it in reset_gate().
    if (!BEFORE && resets(p, t, b)) memset(flow, 0, n * sizeof(R));
  }

  // dh = clip(dy + flow)
  RECATTN_FN void arrive(int64_t t, int64_t b, int64_t j, int64_t n, const R* flow, R* dh, R* buffer) const {
    if (p.grad_output.data) {
      const R* dy = widened(p.dtype, place(p, p.grad_output, t, b, j), buffer, n);
      RECATTN_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) dh[i] = clamp_symmetric(dy[i] + flow[i], clip);
    } else {
      RECATTN_INDEPENDENT
      for (int64_t i = 0; i < n; ++i) dh[i] = clamp_symmetric(flow[i], clip);
    }
  }

  // squashed = tanh(c'), or tanh(LN(c')); dc gets what comes to c' through it.
  RECATTN_FN void squash(int64_t b, int64_t n, const R* gates, const R* c, const R* dh, R* dc, R* squashed,
                         R* buffer) const {
    if (!p.ln_c_weight) return squash_row(gates, c, dh, dc, squashed, p.H, n);
    double* grad_weight = sums_of(b) + 2 * G * p.H;
    squash_normed_row(gates, c, static_cast<const R*>(p.ln_c_weight), static_cast<const R*>(p.ln_c_bias), dh, dc,
                      squashed, buffer, buffer + width, grad_weight, grad_weight + p.H, p.H, n);
  }

  // gru_before: sum = weight_hn^T dn, the gradient of r * h.
  RECATTN_FN void reset_gate(int64_t t, int64_t b, int64_t j, int64_t n, const R* sum, R* local) {
    const R *r = kept(p.gates, KEPT, t, b) + j, *h = h_before(t, b, j, n, local);
    R *to = dq(t, b) + j, *flow = flow_h + b * p.H + j;
    gru_reset_row(r, h, sum, flow, to, n);
    narrowed(p.dtype, place(p, p.grad_x, t, b, j), to, n);
    if (resets(p, t, b)) memset(flow, 0, n * sizeof(R));
  }

  // The sums over the steps and rows of b's group: dL/dln_weight, dL/dln_bias, then those of the cell's layer norm.
  double* sums_of(int64_t b) const {
    int64_t group = b * groups / p.B;
    while (b >= part(p.B, group + 1, groups)) ++group;
    return sums + group * sums_size;
  }

  // A step of a whole row, and the layer norm's backward.
  void whole_row(int64_t t, int64_t b, R* local) {
    if constexpr (!BEFORE) {
      cell(t, b, 0, p.H, local);
      R* grad = dq(t, b);
      const R* normed = p.ln_weight ? kept(p.normed, G, t, b) : nullptr;
      add_sums(grad, normed, sums_of(b), sums_of(b) + G * p.H, G * p.H);
      if (!p.ln_weight) return;
      const R* weight = static_cast<const R*>(p.ln_weight);
      for (int64_t i = 0; i < G * p.H; ++i) grad[i] *= weight[i];
      normalise_backward(grad, normed, static_cast<const R*>(p.rstd)[row_of(p, t, b)], G * p.H);
    }
  }

  void reduce_sums() const {
    const auto reduce = [&](int64_t offset, int64_t n, void* to) {
      for (int64_t i = 0; i < n && to; ++i) {
        double sum = 0;
        for (int64_t group = 0; group < groups; ++group) sum += sums[group * sums_size + offset + i];
        static_cast<R*>(to)[i] = R(sum);
      }
    };
    reduce(0, G * p.H, p.grad_ln_weight);
    reduce(G * p.H, G * p.H, p.grad_ln_bias);
    reduce(G * p.H, G * p.H, p.grad_bias_hh);
    reduce(2 * G * p.H, p.H, p.grad_ln_c_weight);
    reduce((2 * G + 1) * p.H, p.H, p.grad_ln_c_bias);
  }

  // Every step of every row in order, for WeightProduct: columns `from` on of dq beside h[t-1], or r * h[t-1].
  struct Terms {
    const Backward& own;
    int64_t from;
    bool times_r;

    struct Position {
      int64_t t = 0, b = 0;
    };
    bool next(Position& at, Term<R>& term) const {
      const GatedBackward& p = own.p;
      for (; at.t < p.T; ++at.t, at.b = 0) {
        while (at.b < p.B && at.t >= steps_of(p, at.b)) ++at.b;
        if (at.b == p.B) continue;
        const int64_t t = at.t, b = at.b++;
        const bool reset = resets(p, t, b), first = taken_before(p, t, b) == 0;
        term.grad = own.dq(t, b) + from;
        term.times = times_r ? own.kept(p.gates, KEPT, t, b) : nullptr;
        term.wide = reset || first;
        if (!term.wide) {
          term.state = place(p, p.output, p.reverse ? t + 1 : t - 1, b);
        } else {
          term.state = !reset && p.h0 ? static_cast<const R*>(p.h0) + b * p.H : own.zeros;
        }
        return true;
      }
      return false;
    }
  };

  void weight_product(int64_t from, int64_t M, bool times_r, R* weight, R* bias) {
    const Terms terms = {*this, from, times_r};
    WeightProduct<R, Terms>(terms, p.dtype, M, p.H, weight, bias, tiles, threads).run();
  }

  const GatedBackward& p;
  const int threads;
  const bool by_rows;  // whole rows of gates, as layer norm needs
  const int64_t width, K;
  const bool direct, tiles;  // without packing; as amx.h has them
  const int64_t groups, weight_bytes, second_bytes, parts_size, sums_size, local_size;
  const bool apart;
  Workspace memory;
  R *const packed, *const packed_second, *const zeros, *const flow_h, *const flow_c;
  double* const sums;
  R* const scratch;
  Bits* const parts;
  SeenByAll seen;
  const Sequence grad_q;
  const R clip;
  const Zoneout split_h, split_c;
  Weights first, second;
};

}  // namespace

void gated_backward(const GatedBackward& p) {
  if (p.H == 0) return;
  by_cell(p, [&]<Cell C, class R>() { Backward<C, R>(p).run(); });
}

}  // namespace RECATTN_ISA
}  // namespace recattn
