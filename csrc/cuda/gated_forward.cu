// The persistent forward kernels of rnn, lstm and gru. See gated.cuh.
#include "gated.cuh"

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

template <class E, Cell C>
__device__ Inputs<C> inputs(const GatedForward& p, const Block<E>& block, const Place& at, int64_t i, int steps) {
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

template <class E, Cell C>
Layout layout_of(const GatedForward& p) {
  constexpr int G = gates_of(C);
  return {p.plan, G * p.plan.units, p.H, int(sizeof(typename E::Element)), E::STAGE, states_of(C), G * p.plan.units};
}

template <class E, Cell C>
__global__ void __launch_bounds__(BLOCK_THREADS, 1)
    forward_kernel(const __grid_constant__ GatedForward p, const __grid_constant__ Layout layout) {
  // q = W_hh h[t-1] + bias_hh;  h[t], c[t] = cell(x[t], q, h[t-1], c[t-1])
  // A state that is reset before the next step is left as 0 in the exchange, and as it is beside it.
  constexpr int G = gates_of(C), KEPT = kept_of(C);
  using Element = typename E::Element;
  const int units = p.plan.units, places = p.plan.rows * units;
  char* memory = shared_memory();
  Block<E> block(p, layout);
  Product<E> product(layout, memory);
  float* h = reinterpret_cast<float*>(memory + layout.h);
  float* c = reinterpret_cast<float*>(memory + layout.c);
  float* bias = reinterpret_cast<float*>(memory + layout.bias);
  int* steps = reinterpret_cast<int*>(memory + layout.lengths);

  const Element* weight_hh = static_cast<const Element*>(p.weight_hh.data);
  const bool whole = p.H % Product<E>::QUARTER == 0 && reinterpret_cast<uintptr_t>(weight_hh) % 16 == 0;
  product.template fill<false>([&](int row, int64_t k) {
    const int64_t n = block.unit(row % units), left = p.H - k;
    if (row >= G * units || n >= p.H || left <= 0) return uint4{};
    const Element* from = weight_hh + (row / units * p.H + n) * p.H + k;
    if (whole) return *reinterpret_cast<const uint4*>(from);
    return gather<Element>([&](int i) { return i < left ? from[i] : Element(0); });
  });
  for (int i = threadIdx.x; i < G * units; i += BLOCK_THREADS) {
    const int64_t n = block.unit(i % units);
    bias[i] = n < p.H ? load(p.bias_hh, i / units * p.H + n) : 0.0f;
  }
  for (int i = threadIdx.x; i < p.plan.rows; i += BLOCK_THREADS) steps[i] = int(block.steps(block.place(i * units).b));
  for (int i = threadIdx.x; i < places; i += BLOCK_THREADS) {
    const Place at = block.place(i);
    if (!at.inside) continue;
    h[i] = load(p.h0, at.b * p.H + at.n);
    if (C == Cell::lstm) c[i] = load(p.c0, at.b * p.H + at.n);
    block.leave(0, at.row, at.n, p.T > 0 && block.resets(time_of(p, 0), at.b) ? 0.0f : h[i]);
  }
  block.arrive();

  for (int64_t step = 0; step < p.T; ++step) {
    const int64_t t = time_of(p, step);
    Inputs<C> in;
    if (int(threadIdx.x) < places) {
      const Place first = block.place(threadIdx.x);
      in = inputs<E, C>(p, block, first, step, steps[first.row]);
    }
    block.template prefetch_later<G>(p.x, p.dtype, t, steps);
    block.wait();
    for (int row0 = 0; row0 < p.plan.rows; row0 += BATCH) {
      const int rows = p.plan.rows - row0 < BATCH ? p.plan.rows - row0 : BATCH;
      if (row0 > 0) __syncthreads();
      product.run(block.exchanged(step, row0), rows / COLUMN_TILE);
      __syncthreads();
      for (int i = row0 * units + threadIdx.x; i < (row0 + rows) * units; i += BLOCK_THREADS) {
        const Place at = block.place(i);
        if (i != int(threadIdx.x)) in = inputs<E, C>(p, block, at, step, steps[at.row]);
        if (!at.inside) continue;
        if (in.valid) {
          const States old{in.reset ? 0.0f : h[i], C == Cell::lstm && !in.reset ? c[i] : 0.0f};
          float x[G], q[G], kept[KEPT];
          for (int g = 0; g < G; ++g) {
            const int row = g * units + at.unit;
            x[g] = value_of(in.x[g], p.dtype);
            q[g] = product.sum(row, at.row - row0) + bias[row];
          }
          const States fresh = cell<C>(p, x, q, old, kept);
          h[i] = zoneout(p.keep_h, in.keep_h, p.zoneout_h, old.h, fresh.h);
          if (C == Cell::lstm) c[i] = zoneout(p.keep_c, in.keep_c, p.zoneout_c, old.c, fresh.c);
          if (p.gates) {
            for (int k = 0; k < KEPT; ++k) p.gates[((t * p.B + at.b) * KEPT + k) * p.H + at.n] = kept[k];
          }
        }
        block.leave(step + 1, at.row, at.n, in.next_reset ? 0.0f : h[i]);
        block.put(p.output, t, at, in.valid ? h[i] : 0.0f);
        if (C == Cell::lstm && p.cells) p.cells[(t * p.B + at.b) * p.H + at.n] = c[i];
        if (!in.valid && p.gates) {
          for (int k = 0; k < KEPT; ++k) p.gates[((t * p.B + at.b) * KEPT + k) * p.H + at.n] = 0.0f;
        }
      }
    }
    if (step + 1 < p.T) block.arrive();
  }
  __syncthreads();
  for (int i = threadIdx.x; i < places; i += BLOCK_THREADS) {
    const Place at = block.place(i);
    if (!at.inside) continue;
    store(p.h_n, at.b * p.H + at.n, h[i]);
    if (C == Cell::lstm) store(p.c_n, at.b * p.H + at.n, c[i]);
  }
}

}  // namespace
}  // namespace RECATTN_ISA

using namespace RECATTN_ISA;

void gated_forward(const GatedForward& p, cudaStream_t stream) {
  by_kernel(p, [&]<class E, Cell C>() {
    launch(forward_kernel<E, C>, p, layout_of<E, C>(p), stream, "gated: the forward kernel");
  });
}

}  // namespace recattn
