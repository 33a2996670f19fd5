// The persistent forward kernels of rnn, lstm and gru. See gated.cuh.
#include "gated_norm.cuh"

namespace recattn {
namespace RECATTN_ISA {
namespace {

struct States {
  float h, c;
};

// x, q: of each gate, q = W_hh h + bias_hh
template <Cell C>
RECATTN_FN States cell(const Gated& p, const float* x, const float* q, const States& old, float* kept) {
  if constexpr (C == Cell::lstm) {
    // c = sigmoid(f) * c + sigmoid(i) * tanh(g);  h = sigmoid(o) * tanh(c)
    const LstmGates<float> a = lstm_gates(x[0] + q[0], x[1] + q[1], x[2] + q[2], x[3] + q[3]);
    const float c = lstm_cell(a, old.c);
    kept[0] = a.i, kept[1] = a.f, kept[2] = a.g, kept[3] = a.o;
    return {a.o * tanh_(c), c};
  } else if constexpr (C == Cell::gru) {
    // r = sigmoid(x_r + q_r);  z = sigmoid(x_z + q_z);  n = tanh(x_n + r * q_n);  h = (1 - z) * n + z * h
    const float r = sigmoid(x[0] + q[0]), z = sigmoid(x[1] + q[1]), n = tanh_(x[2] + r * q[2]);
    kept[0] = r, kept[1] = z, kept[2] = n, kept[3] = q[2];
    return {gru_state(z, n, old.h), 0.0f};
  } else {
    // h = act(x + q)
    const float v = x[0] + q[0];
    kept[0] = p.cell == Cell::rnn_relu ? activate<Activation::relu>(v, 0.0f) : tanh_(v);
    return {kept[0], 0.0f};
  }
}

// What a place needs in a step and does not come from the other blocks. It is as it lies in memory, and becomes a value
// after the wait for them, which so does not begin with a wait for memory.
template <Cell C>
struct Inputs {
  uint32_t x[gates_of(C)] = {}, reset = 0, next_reset = 0, keep_h = 0, keep_c = 0;
  bool valid = false;
};

RECATTN_FN int64_t time_of(const Gated& p, int64_t i) { return p.reverse ? p.T - 1 - i : i; }

template <Cell C, class Block>
__device__ Inputs<C> inputs(const GatedForward& p, const Block& block, const Place& at, int64_t i, int steps) {
  Inputs<C> in;
  if (!at.inside) return in;
  const int64_t t = time_of(p, i);
  if (i + 1 < p.T) in.next_reset = block.resets(time_of(p, i + 1), at.b);
  in.valid = t < steps;
  if (!in.valid) return in;
  block.fetch(p.x, t, at, in.x);
  in.reset = block.resets(t, at.b);
  in.keep_h = block.keeps(p.keep_h, t, at);
  in.keep_c = block.keeps(p.keep_c, t, at);
  return in;
}

template <class E, Cell C, bool NORMED>
Layout layout_of(const GatedForward& p) {
  constexpr int G = gates_of(C), NORMS = C == Cell::lstm ? 2 : 1;
  const int rows = G * p.plan.units;
  Needs needs{rows, p.H, int(sizeof(typename E::Element)), E::STAGE, states_of(C), rows};
  if (NORMED) {
    needs.biases += rows + (NORMS - 1) * 2 * p.plan.units;
    needs.table = rows;
    needs.met = NORMS;
  }
  return {p.plan, needs};
}

template <class E, Cell C, bool NORMED, Exchange X>
__global__ void __launch_bounds__(BLOCK_THREADS, 1)
    forward_kernel(const __grid_constant__ GatedForward p, const __grid_constant__ Layout layout) {
  // q = W_hh h[t-1] + bias_hh, or LN(W_hh h[t-1]) + bias_hh;  h[t], c[t] = cell(x[t], q, h[t-1], c[t-1])
  // A state that is reset before the next step is left as 0 in the exchange, and as it is beside it.
  constexpr int G = gates_of(C), KEPT = kept_of(C), TURNS = turns_of(C);
  using Element = typename E::Element;
  const int units = p.plan.units, places = p.plan.rows * units, columns = G * units;
  char* memory = shared_memory();
  Block<E, X> block(p, layout, memory);
  Product<E> product(layout, memory);
  const Norm norm(block, columns);
  float* h = reinterpret_cast<float*>(memory + layout.h);
  float* c = reinterpret_cast<float*>(memory + layout.c);  // gru_before: z, from one product to the other
  float* bias = reinterpret_cast<float*>(memory + layout.bias);
  float *ln_weight = bias + columns, *ln_c_weight = ln_weight + columns, *ln_c_bias = ln_c_weight + units;
  int* steps = reinterpret_cast<int*>(memory + layout.lengths);
  float* table = reinterpret_cast<float*>(memory + layout.table);  // what is normalised
  Pair* mean_rstd = reinterpret_cast<Pair*>(memory + layout.statistics);

  const Element* weight_hh = static_cast<const Element*>(p.weight_hh.data);
  const bool whole = p.H % Product<E>::QUARTER == 0 && reinterpret_cast<uintptr_t>(weight_hh) % 16 == 0;
  product.template fill<false>([&](int row, int64_t k) {
    const int64_t n = block.unit(row % units), left = p.H - k;
    if (row >= G * units || n >= p.H || left <= 0) return uint4{};
    const Element* from = weight_hh + (row / units * p.H + n) * p.H + k;
    if (whole) return *reinterpret_cast<const uint4*>(from);
    return gather<Element>([&](int i) { return i < left ? from[i] : Element(0); });
  });
  for (int i = threadIdx.x; i < columns; i += BLOCK_THREADS) {
    const int64_t n = block.unit(i % units), at = i / units * p.H + n;
    bias[i] = n < p.H ? load(p.bias_hh, at) : 0.0f;
    if (!NORMED || n >= p.H) continue;
    bias[i] += load(p.ln_bias, at);
    ln_weight[i] = load(p.ln_weight, at);
    if (C == Cell::lstm && i < units) ln_c_weight[i] = load(p.ln_c_weight, n), ln_c_bias[i] = load(p.ln_c_bias, n);
  }
  for (int i = threadIdx.x; i < p.plan.rows; i += BLOCK_THREADS) steps[i] = int(block.steps(block.place(i * units).b));
  block.each_place([&](int i, const Place& at) {
    h[i] = load(p.h0, at.b * p.H + at.n);
    if (C == Cell::lstm) c[i] = load(p.c0, at.b * p.H + at.n);
    block.leave(0, at.row, at.n, p.T > 0 && block.resets(time_of(p, 0), at.b) ? 0.0f : h[i]);
  });
  if (p.T > 0) block.arrive_with(0, 0, 1);

  for (int64_t step = 0; step < p.T; ++step) {
    const int64_t t = time_of(p, step), turn = step * TURNS;
    Inputs<C> first;
    if (int(threadIdx.x) < places) {
      const Place at = block.place(threadIdx.x);
      first = inputs<C>(p, block, at, step, steps[at.row]);
    }
    block.template prefetch_rows<G>(p.x, p.dtype, t, steps, BLOCK_THREADS / units);
    block.wait();

    const auto inputs_of = [&](int i, const Place& at) {
      return i == int(threadIdx.x) ? first : inputs<C>(p, block, at, step, steps[at.row]);
    };
    const auto old_of = [&](int i, const Inputs<C>& in) {
      return States{in.reset ? 0.0f : h[i], C == Cell::lstm && !in.reset ? c[i] : 0.0f};
    };
    const auto x_of = [&](const Inputs<C>& in, int gate) { return value_of(in.x[gate], p.dtype); };
    const auto keep = [&](const Place& at, int k, float v) {
      if (p.gates) p.gates[((t * p.B + at.b) * KEPT + k) * p.H + at.n] = v;
    };
    const auto finish = [&](int i, const Place& at, const Inputs<C>& in, const States& old, const States& fresh) {
      if (in.valid) {
        h[i] = zoneout(p.keep_h, in.keep_h, p.zoneout_h, old.h, fresh.h);
        if (C == Cell::lstm) c[i] = zoneout(p.keep_c, in.keep_c, p.zoneout_c, old.c, fresh.c);
      }
      block.leave(turn + TURNS, at.row, at.n, in.next_reset ? 0.0f : h[i]);
      block.put(p.output, t, at, in.valid ? h[i] : 0.0f);
      if (C == Cell::lstm && p.cells) p.cells[(t * p.B + at.b) * p.H + at.n] = c[i];
    };

    if constexpr (NORMED) {
      block.multiply(product, turn, product.whole(), [&](int, const Place& at, auto sum) {
        for (int row = at.unit; row < columns; row += units) table[at.row * columns + row] = sum(row);
      });
      const auto meet = [&](int which, int gates) {
        __syncthreads();
        norm.leave_moments(which, table, gates);
        block.arrive();
        block.wait();
        norm.combine_moments(which, gates, mean_rstd);
        __syncthreads();
      };
      meet(0, G);
      block.each_place([&](int i, const Place& at) {
        const Inputs<C> in = inputs_of(i, at);
        const States old = old_of(i, in);
        const auto [mean, rstd] = mean_rstd[at.row];
        float* products = table + at.row * columns + at.unit;
        float x[G], q[G], kept[KEPT] = {};
        States fresh{};
        for (int g = 0; g < G; ++g) {
          const int row = g * units + at.unit;
          const float normed = in.valid ? (products[g * units] - mean) * rstd : 0.0f;
          x[g] = x_of(in, g);
          q[g] = normed * ln_weight[row] + bias[row];
          if (p.normed) p.normed[((t * p.B + at.b) * G + g) * p.H + at.n] = normed;
        }
        if (p.rstd && at.n == 0) p.rstd[t * p.B + at.b] = in.valid ? rstd : 0.0f;
        if (in.valid) fresh = cell<C>(p, x, q, old, kept);
        for (int k = 0; k < KEPT; ++k) keep(at, k, kept[k]);
        if constexpr (C == Cell::lstm) {
          products[0] = fresh.c, products[units] = kept[3];
        } else {
          finish(i, at, in, old, fresh);
        }
      });
      if constexpr (C == Cell::lstm) {
        // h = sigmoid(o) * tanh(LN(c))
        meet(1, 1);
        block.each_place([&](int i, const Place& at) {
          const Inputs<C> in = inputs_of(i, at);
          const auto [mean, rstd] = mean_rstd[at.row];
          const float *own = table + at.row * columns + at.unit, new_c = own[0], o = own[units];
          const float normed = (new_c - mean) * rstd;
          const float h_new = o * tanh_(normed * ln_c_weight[at.unit] + ln_c_bias[at.unit]);
          finish(i, at, in, old_of(i, in), {h_new, new_c});
        });
      }
    } else if constexpr (C == Cell::gru_before) {
      // r = sigmoid(x_r + q_r);  z = sigmoid(x_z + q_z);  n = tanh(x_n + W_hn (r * h) + bias_n)
      block.multiply(product, turn, product.of_rows(0, 2 * units), [&](int i, const Place& at, auto sum) {
        const Inputs<C> in = inputs_of(i, at);
        const auto gate = [&](int g) {
          const int row = g * units + at.unit;
          const float v = in.valid ? sigmoid(x_of(in, g) + (sum(row) + bias[row])) : 0.0f;
          keep(at, g, v);
          return v;
        };
        block.leave(turn + 1, at.row, at.n, gate(0) * old_of(i, in).h);
        c[i] = gate(1);
      });
      block.arrive_with(turn + 1, 0, 1);
      block.wait();
      block.multiply(product, turn + 1, product.of_rows(2 * units, 3 * units), [&](int i, const Place& at, auto sum) {
        const Inputs<C> in = inputs_of(i, at);
        const States old = old_of(i, in);
        const int row = 2 * units + at.unit;
        const float n = in.valid ? tanh_(x_of(in, 2) + (sum(row) + bias[row])) : 0.0f;
        keep(at, 2, n);
        finish(i, at, in, old, {gru_state(c[i], n, old.h), 0.0f});
      });
    } else {
      block.multiply(product, turn, product.whole(), [&](int i, const Place& at, auto sum) {
        const Inputs<C> in = inputs_of(i, at);
        const States old = old_of(i, in);
        float x[G], q[G], kept[KEPT] = {};
        States fresh{};
        if (in.valid) {
          for (int g = 0; g < G; ++g) {
            const int row = g * units + at.unit;
            x[g] = x_of(in, g);
            q[g] = sum(row) + bias[row];
          }
          fresh = cell<C>(p, x, q, old, kept);
        }
        for (int k = 0; k < KEPT; ++k) keep(at, k, kept[k]);
        finish(i, at, in, old, fresh);
      });
    }
    if (step + 1 < p.T) block.arrive_with(turn + TURNS, 0, 1);
  }
  __syncthreads();
  block.each_place([&](int i, const Place& at) {
    store(p.h_n, at.b * p.H + at.n, h[i]);
    if (C == Cell::lstm) store(p.c_n, at.b * p.H + at.n, c[i]);
  });
}

}  // namespace
}  // namespace RECATTN_ISA

using namespace RECATTN_ISA;

void gated_forward(const GatedForward& p, cudaStream_t stream) {
  by_kernel(p, [&]<class E, Cell C, bool NORMED, Exchange X>() {
    launch_gated(forward_kernel<E, C, NORMED, X>, p, layout_of<E, C, NORMED>(p), stream, "gated: the forward kernel");
  });
}

bool gated_clusters() {
  cudaFuncAttributes found{};
  const auto kernel = forward_kernel<BFloat16Product, Cell::gru, false, Exchange::in_cluster>;
  check(cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel)), "gated: the kernels' architecture");
  return found.ptxVersion >= 90;
}

}  // namespace recattn
