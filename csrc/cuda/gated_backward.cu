// The persistent backward kernels of rnn, lstm and gru. See gated.cuh. What has no dependence on time, the gradients of
// weight_hh and bias_hh, is left to the caller; those of a layer norm, whose bias has bias_hh's, are summed here.
#include "gated_norm.cuh"

namespace recattn {
namespace RECATTN_ISA {
namespace {

// What a place needs in a step and does not come from the other blocks. before: h[t-1] in a gru, c[t-1] in the lstm.
// It is as it lies in memory, and becomes a value after the wait for them, which so does not begin with one for memory.
template <Cell C>
struct Inputs {
  float kept[kept_of(C)] = {};
  uint32_t grad_output[1] = {}, before = 0, reset = 0, keep_h = 0, keep_c = 0;
  Dtype before_dtype = Dtype::float32;
  bool valid = false;
};

// dx and dq of each gate, and what reaches the old states other than through q.
template <Cell C>
struct Gradients {
  float x[gates_of(C)], q[gates_of(C)], h, c;
};

template <Cell C>
RECATTN_FN float before_of(const Inputs<C>& in) {
  return in.reset ? 0.0f : value_of(in.before, in.before_dtype);
}

template <Cell C>
RECATTN_FN LstmGates<float> lstm_kept(const Inputs<C>& in) {
  return {in.kept[0], in.kept[1], in.kept[2], in.kept[3]};
}

// c[t] before any zoneout
template <Cell C>
RECATTN_FN float cell_state(const Inputs<C>& in) {
  return lstm_cell(lstm_kept(in), before_of(in));
}

// Of h = o * value in the lstm: value, tanh(c) or tanh(LN(c)), and what reaches c through it.
struct Squashed {
  float value, dc;
};

// From dL/dh[t] and dL/dc[t].
template <Cell C>
RECATTN_FN Gradients<C> cell_backward(const Gated& p, const Inputs<C>& in, float dh, float dc,
                                      const Squashed& squashed) {
  Gradients<C> d{};
  if constexpr (C == Cell::lstm) {
    const LstmGates<float> a = lstm_kept(in);
    dc += squashed.dc;
    const LstmGates<float> gates = lstm_backward(a, before_of(in), squashed.value, dc, dh);
    d.x[0] = gates.i, d.x[1] = gates.f, d.x[2] = gates.g, d.x[3] = gates.o;
    d.c = dc * a.f;
  } else if constexpr (is_gru(C)) {
    // gru_before: without d.x[0], which is known later
    const float r = in.kept[0], z = in.kept[1], n = in.kept[2], dn = gru_backward_n(z, n, dh);
    if constexpr (C == Cell::gru) d.x[0] = dn * in.kept[3] * sigmoid_slope(r);
    d.x[1] = gru_backward_z(z, n, before_of(in), dh), d.x[2] = dn;
    d.h = dh * z;
  } else {
    const float h = in.kept[0];
    constexpr Activation RELU = Activation::relu;
    d.x[0] = p.cell == Cell::rnn_relu ? times_derivative<RELU>(dh, derivative<RELU>(h, 0.0f)) : dh * tanh_slope(h);
  }
  for (int g = 0; g < gates_of(C); ++g) d.q[g] = d.x[g];
  if constexpr (C == Cell::gru) d.q[2] = d.x[2] * in.kept[0];
  return d;
}

// In the order of the backward: step 0 is the last that was taken.
RECATTN_FN int64_t time_of(const Gated& p, int64_t i) { return p.reverse ? i : p.T - 1 - i; }

template <Cell C, class Block>
__device__ Inputs<C> inputs(const GatedBackward& p, const Block& block, const Place& at, int64_t step, int steps) {
  Inputs<C> in;
  const int64_t t = time_of(p, step), earlier = p.reverse ? t + 1 : t - 1;
  in.valid = at.inside && step < p.T && t < steps;
  if (!in.valid) return in;
  const float* kept = static_cast<const float*>(p.gates.data) + t * p.gates.stride_t + at.b * p.gates.stride_b + at.n;
  for (int k = 0; k < kept_of(C); ++k) in.kept[k] = kept[k * p.H];
  if (p.grad_output.data) block.fetch(p.grad_output, t, at, in.grad_output);
  const auto read_before = [&](const Plain& from, int64_t i) {
    in.before = bits_at(from, i);
    in.before_dtype = from.dtype;
  };
  const bool first = earlier < 0 || earlier >= steps;
  const int64_t initial = at.b * p.H + at.n;
  if (is_gru(C)) {
    const int64_t i = earlier * p.output.stride_t + at.b * p.output.stride_b + at.n;
    read_before(first ? p.h0 : Plain{p.output.data, p.dtype}, first ? initial : i);
  }
  if (C == Cell::lstm) {
    read_before(first ? p.c0 : Plain{p.cells, Dtype::float32}, first ? initial : earlier * p.B * p.H + initial);
  }
  in.reset = block.resets(t, at.b);
  in.keep_h = block.keeps(p.keep_h, t, at);
  in.keep_c = block.keeps(p.keep_c, t, at);
  return in;
}

template <class E, Cell C, bool NORMED>
Layout layout_of(const GatedBackward& p) {
  constexpr int G = gates_of(C);
  Needs needs{p.plan.units, G * p.H, int(sizeof(typename E::Element)), E::STAGE, states_of(C), 0};
  if (NORMED) {
    needs.biases = (G + (C == Cell::lstm ? 2 : 0)) * p.plan.units;
    needs.table = 2 * G * p.plan.units;
    needs.met = C == Cell::lstm ? 3 : 1;
  }
  return {p.plan, needs};
}

template <class E, Cell C, bool NORMED, Exchange X>
__global__ void __launch_bounds__(BLOCK_THREADS, 1)
    backward_kernel(const __grid_constant__ GatedBackward p, const __grid_constant__ Layout layout) {
  // dh[t] = clip(dy[t] + dh' + dq[t+1] W_hh);  dx[t], dq[t] = cell's backward of it;  dh' from h[t] past dq[t]
  // With a layer norm dq is that of W_hh h: d = dL/dLN * weight;  dq = rstd * (d - mean(d) - normed * mean(d * normed))
  // dq of a step before which the state was reset is left as 0 in the exchange: it goes no further.
  constexpr int G = gates_of(C), TURNS = turns_of(C);
  constexpr bool NORMED_C = NORMED && C == Cell::lstm;
  enum { OF_C, THROUGH_C, THROUGH_Q };  // what blocks leave of each row in a step
  using Element = typename E::Element;
  const int units = p.plan.units, places = p.plan.rows * units, columns = G * units;
  char* memory = shared_memory();
  Block<E, X> block(p, layout, memory);
  Product<E> product(layout, memory);
  const Norm norm(block, columns);
  float* dh = reinterpret_cast<float*>(memory + layout.h);  // without what comes through q
  float* dc = reinterpret_cast<float*>(memory + layout.c);  // gru_before: dz, from one product to the other
  int* steps = reinterpret_cast<int*>(memory + layout.lengths);
  float* ln_weight = reinterpret_cast<float*>(memory + layout.bias);
  float *ln_c_weight = ln_weight + columns, *ln_c_bias = ln_c_weight + units;
  float* grads = reinterpret_cast<float*>(memory + layout.table);  // (rows, columns)
  float* normed = grads + p.plan.rows * columns;
  Pair* of_c = reinterpret_cast<Pair*>(memory + layout.statistics);  // mean and rstd
  Pair* means = of_c + p.plan.rows;
  float* rstd = reinterpret_cast<float*>(means + p.plan.rows);
  Sum sums[4];  // of the thread's column, the gradients of LN's weight and bias, then those of LN(c)'s

  const Element* weight_hh = static_cast<const Element*>(p.weight_hh.data);
  product.template fill<true>([&](int row, int64_t k) {
    const int64_t n = block.unit(row), left = G * p.H - k;
    if (row >= units || n >= p.H) return uint4{};
    return gather<Element>([&](int i) { return i < left ? weight_hh[(k + i) * p.H + n] : Element(0); });
  });
  for (int i = threadIdx.x; NORMED && i < columns; i += BLOCK_THREADS) {
    const int64_t n = block.unit(i % units);
    if (n >= p.H) continue;
    ln_weight[i] = load(p.ln_weight, i / units * p.H + n);
    if (NORMED_C && i < units) ln_c_weight[i] = load(p.ln_c_weight, n), ln_c_bias[i] = load(p.ln_c_bias, n);
  }
  for (int i = threadIdx.x; i < p.plan.rows; i += BLOCK_THREADS) steps[i] = int(block.steps(block.place(i * units).b));
  block.each_place([&](int i, const Place& at) {
    dh[i] = load(p.grad_h_n, at.b * p.H + at.n);
    if (C == Cell::lstm) dc[i] = load(p.grad_c_n, at.b * p.H + at.n);
  });
  __syncthreads();

  Inputs<C> first;
  const auto expect = [&](int64_t step) {
    if (int(threadIdx.x) < places) {
      const Place at = block.place(threadIdx.x);
      first = inputs<C>(p, block, at, step, steps[at.row]);
    }
    if (step >= p.T) return;
    const int64_t t = time_of(p, step), earlier = p.reverse ? t + 1 : t - 1;
    const int later = BLOCK_THREADS / units;  // a row of which no thread has its first place
    block.template prefetch_rows<kept_of(C)>(p.gates, Dtype::float32, t, steps, later);
    if (p.grad_output.data) block.template prefetch_rows<1>(p.grad_output, p.dtype, t, steps, later);
    if (is_gru(C)) block.template prefetch_rows<1>(p.output, p.dtype, earlier, steps, later);
    if (C == Cell::lstm) {
      block.template prefetch_rows<1>({p.cells, p.B * p.H, p.H}, Dtype::float32, earlier, steps, later);
    }
  };
  const auto row_of = [&](const Place& at) { return grads + at.row * columns + at.unit; };
  // c of the step to come, of which the mean is needed there before anything else.
  const auto leave_c = [&] {
    __syncthreads();
    norm.leave_moments(OF_C, grads, 1);
  };
  if (NORMED_C && p.T > 0) {
    expect(0);
    block.each_place([&](int i, const Place& at) {
      const Inputs<C> in = i == int(threadIdx.x) ? first : inputs<C>(p, block, at, 0, steps[at.row]);
      row_of(at)[0] = cell_state(in);
    });
    leave_c();
    block.arrive();
  }

  // The step past the last is that of the initial states' gradients.
  const bool initial = p.grad_h0.data != nullptr || p.grad_c0.data != nullptr;
  for (int64_t step = 0; step < p.T + initial; ++step) {
    const int64_t t = time_of(p, step), turn = step * TURNS;
    if (!NORMED_C) expect(step);
    if (NORMED && step < p.T) {
      block.each_place([&](int, const Place& at) {
        const int64_t row = t * p.B + at.b;
        float* own = normed + at.row * columns + at.unit;
        for (int g = 0; g < G; ++g) own[g * units] = p.normed[(row * G + g) * p.H + at.n];
        if (at.unit == 0) rstd[at.row] = p.rstd[row];
      });
    }
    if (step > 0 || (NORMED_C && step < p.T)) block.wait();
    if (NORMED_C && step < p.T) norm.combine_moments(OF_C, 1, of_c);

    const auto inputs_of = [&](int i, const Place& at) {
      return i == int(threadIdx.x) ? first : inputs<C>(p, block, at, step, steps[at.row]);
    };
    // What dL/dh[t] and dL/dc[t] become before the cell's backward.
    const auto arriving_h = [&](int i, const Inputs<C>& in) {
      const float d = clamp_symmetric(dh[i] + value_of(in.grad_output[0], p.dtype), p.grad_clip);
      return zoneout_backward(p.keep_h, in.keep_h, p.zoneout_h, d);
    };
    const auto arriving_c = [&](int i, const Inputs<C>& in) {
      const float d = C == Cell::lstm ? clamp_symmetric(dc[i], p.grad_clip) : 0.0f;
      return zoneout_backward(p.keep_c, in.keep_c, p.zoneout_c, d);
    };
    const auto put_x = [&](const Place& at, int gate, float d) { block.put(p.grad_x, t, at, d, gate); };
    const auto put_q = [&](const Place& at, int gate, float d) {
      store({p.grad_q.data, p.weight_hh.dtype},
            t * p.grad_q.stride_t + at.b * p.grad_q.stride_b + gate * p.H + at.n, d);
    };
    const auto leave_q = [&](const Place& at, const Inputs<C>& in, int gate, float d) {
      block.leave(turn + TURNS, at.row, gate * p.H + at.n, in.reset ? 0.0f : d);
    };
    const auto finish = [&](int i, const Place& at, const Inputs<C>& in, const Squashed& squashed) {
      Gradients<C> d{};
      if (in.valid) {
        const Shares of_h = arriving_h(i, in), of_c = arriving_c(i, in);
        d = cell_backward<C>(p, in, of_h.fresh, of_c.fresh, squashed);
        dh[i] = in.reset ? 0.0f : of_h.old + d.h;
        if (C == Cell::lstm) dc[i] = in.reset ? 0.0f : of_c.old + d.c;
      }
      for (int g = 0; g < G; ++g) {
        put_x(at, g, d.x[g]);
        if (NORMED) {
          row_of(at)[g * units] = d.q[g];
        } else {
          put_q(at, g, d.q[g]);
          leave_q(at, in, g, d.q[g]);
        }
      }
    };

    // gru_before has left dr and dz here, and what goes through dn is in dh.
    const Part part = step == 0 ? Part{} : C == Cell::gru_before ? product.of_inner(0, 2 * p.H) : product.whole();
    block.multiply(product, turn, part, [&](int i, const Place& at, auto sum) {
      dh[i] += sum(at.unit);
      if (step == p.T) {
        store(p.grad_h0, at.b * p.H + at.n, dh[i]);
        if (C == Cell::lstm) store(p.grad_c0, at.b * p.H + at.n, dc[i]);
        return;
      }
      const Inputs<C> in = inputs_of(i, at);
      if constexpr (C == Cell::gru_before) {
        Gradients<C> d{};
        if (in.valid) {
          const Shares of_h = arriving_h(i, in);
          d = cell_backward<C>(p, in, of_h.fresh, 0.0f, {});
          dh[i] = of_h.old + d.h;
        }
        dc[i] = d.x[1];
        for (int g = 1; g < G; ++g) put_x(at, g, d.x[g]), put_q(at, g, d.q[g]);
        block.leave(turn + 1, at.row, 2 * p.H + at.n, d.q[2]);
      } else if constexpr (NORMED_C) {
        // dL/dLN(c), and LN(c) without weight and bias
        float* own = row_of(at);
        own[0] = own[units] = 0.0f;
        if (!in.valid) return;
        const auto [mean, rstd_c] = of_c[at.row];
        own[units] = (cell_state(in) - mean) * rstd_c;
        const float value = tanh_(own[units] * ln_c_weight[at.unit] + ln_c_bias[at.unit]);
        own[0] = arriving_h(i, in).fresh * in.kept[3] * tanh_slope(value);
      } else {
        Squashed squashed{};
        if constexpr (C == Cell::lstm) {
          squashed.value = tanh_(cell_state(in));
          squashed.dc = arriving_h(i, in).fresh * in.kept[3] * tanh_slope(squashed.value);
        }
        finish(i, at, in, squashed);
      }
    });
    if (step == p.T) break;

    if constexpr (C == Cell::gru_before) {
      // d(r * h) = dn W_hn;  dr = d(r * h) * h * r * (1 - r);  dh' += d(r * h) * r
      block.arrive_with(turn + 1, 2, 1);
      block.wait();
      block.multiply(product, turn + 1, product.of_inner(2 * p.H, 3 * p.H), [&](int i, const Place& at, auto sum) {
        const Inputs<C> in = inputs_of(i, at);
        float dr = 0.0f;
        if (in.valid) {
          const float d = sum(at.unit), r = in.kept[0];
          dr = d * before_of(in) * sigmoid_slope(r);
          dh[i] = in.reset ? 0.0f : dh[i] + d * r;
        }
        put_x(at, 0, dr);
        put_q(at, 0, dr);
        leave_q(at, in, 0, dr);
        leave_q(at, in, 1, dc[i]);
      });
    }
    if constexpr (NORMED_C) {
      // d = dL/dLN(c) * weight;  dc += rstd * (d - mean(d) - normed * mean(d * normed))
      __syncthreads();
      norm.leave_sums(THROUGH_C, grads, grads + units, ln_c_weight, 1);
      block.arrive();
      norm.add_columns(grads, grads + units, 1, sums[2], sums[3]);
      block.wait();
      norm.combine_means(THROUGH_C, float(p.H), means);
      __syncthreads();
      block.each_place([&](int i, const Place& at) {
        const Inputs<C> in = inputs_of(i, at);
        const float *own = row_of(at), weight = ln_c_weight[at.unit], bias = ln_c_bias[at.unit];
        const auto [mean, along] = means[at.row];
        finish(i, at, in, {tanh_(own[units] * weight + bias),
                           of_c[at.row].second * (own[0] * weight - mean - own[units] * along)});
      });
    }
    if constexpr (NORMED) {
      constexpr int WHICH = NORMED_C ? THROUGH_Q : 0;
      __syncthreads();
      norm.leave_sums(WHICH, grads, normed, ln_weight, G);
      block.arrive();
      norm.add_columns(grads, normed, G, sums[0], sums[1]);
      const Inputs<C> here = first;
      const bool more = step + 1 < p.T;
      if (more) {
        const Sequence kept{p.normed, p.B * G * p.H, G * p.H};
        block.template prefetch_rows<G>(kept, Dtype::float32, time_of(p, step + 1), steps);
        if (NORMED_C) expect(step + 1);
      }
      block.wait();
      norm.combine_means(WHICH, float(G * p.H), means);
      __syncthreads();
      block.each_place([&](int i, const Place& at) {
        const Inputs<C> in = i == int(threadIdx.x) ? here : inputs<C>(p, block, at, step, steps[at.row]);
        const auto [mean, along] = means[at.row];
        float* own = row_of(at);
        for (int g = 0; g < G; ++g) {
          const float v = normed[own - grads + g * units], d = own[g * units] * ln_weight[g * units + at.unit];
          const float dq = in.valid ? rstd[at.row] * (d - mean - v * along) : 0.0f;
          put_q(at, g, dq);
          leave_q(at, in, g, dq);
        }
        if (NORMED_C && more) {
          own[0] = cell_state(i == int(threadIdx.x) ? first : inputs<C>(p, block, at, step + 1, steps[at.row]));
        }
      });
      if (NORMED_C && more) leave_c();
    }
    if (step + 1 < p.T + initial) block.arrive_with(turn + TURNS, 0, C == Cell::gru_before ? 2 : G);
  }
  if constexpr (NORMED) {
    static_assert(4 * ROW_TILES * ROW_TILE <= BLOCK_THREADS, "a thread has one column at most");
    const int64_t n = block.unit(int(threadIdx.x) % units), gate = int(threadIdx.x) / units;
    if (block.rows() == 0 || int(threadIdx.x) >= columns || n >= p.H) return;
    float* of_rows = p.sums + block.row_block() * (2 * G + 2 * NORMED_C) * p.H + n;
    of_rows[gate * p.H] = sums[0].value(), of_rows[(G + gate) * p.H] = sums[1].value();
    if (NORMED_C && gate == 0) of_rows[2 * G * p.H] = sums[2].value(), of_rows[(2 * G + 1) * p.H] = sums[3].value();
  }
}

}  // namespace
}  // namespace RECATTN_ISA

using namespace RECATTN_ISA;

void gated_backward(const GatedBackward& p, cudaStream_t stream) {
  by_kernel(p, [&]<class E, Cell C, bool NORMED, Exchange X>() {
    launch_gated(backward_kernel<E, C, NORMED, X>, p, layout_of<E, C, NORMED>(p), stream, "gated: the backward kernel");
  });
}

}  // namespace recattn
