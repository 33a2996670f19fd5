// The persistent backward kernels of rnn, lstm and gru. See gated.cuh. What has no dependence on time, the gradients of
// weight_hh and bias_hh, is left to the caller.
#include "gated.cuh"

namespace recattn {
namespace RECATTN_ISA {
namespace {

// What a place needs in a step and does not come from the other blocks. before: h[t-1] in the gru, c[t-1] in the lstm.
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

// From dL/dh[t] and dL/dc[t].
template <Cell C>
RECATTN_FN Gradients<C> cell_backward(const Gated& p, const Inputs<C>& in, float dh, float dc) {
  Gradients<C> d{};
  const float before = in.reset ? 0.0f : value_of(in.before, in.before_dtype);
  if constexpr (C == Cell::lstm) {
    const LstmGates<float> a{in.kept[0], in.kept[1], in.kept[2], in.kept[3]};
    const float squashed = tanh_(lstm_cell(a, before));
    dc += dh * a.o * tanh_slope(squashed);
    const LstmGates<float> gates = lstm_backward(a, before, squashed, dc, dh);
    d.x[0] = gates.i, d.x[1] = gates.f, d.x[2] = gates.g, d.x[3] = gates.o;
    d.c = dc * a.f;
  } else if constexpr (C == Cell::gru) {
    const float r = in.kept[0], z = in.kept[1], n = in.kept[2], q_n = in.kept[3];
    const float dn = gru_backward_n(z, n, dh);
    d.x[0] = dn * q_n * sigmoid_slope(r), d.x[1] = gru_backward_z(z, n, before, dh), d.x[2] = dn;
    d.h = dh * z;
  } else {
    const float h = in.kept[0];
    d.x[0] = dh * (p.cell == Cell::rnn_relu ? derivative<Activation::relu>(h, 0.0f) : tanh_slope(h));
  }
  for (int g = 0; g < gates_of(C); ++g) d.q[g] = d.x[g];
  if constexpr (C == Cell::gru) d.q[2] = d.x[2] * in.kept[0];
  return d;
}

// In the order of the backward: step 0 is the last that was taken.
RECATTN_FN int64_t time_of(const Gated& p, int64_t i) { return p.reverse ? i : p.T - 1 - i; }

template <class E, Cell C>
__device__ Inputs<C> inputs(const GatedBackward& p, const Block<E>& block, const Place& at, int64_t step, int steps) {
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
  if (C == Cell::gru) {
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

template <class E, Cell C>
Layout layout_of(const GatedBackward& p) {
  return {p.plan, p.plan.units, gates_of(C) * p.H, int(sizeof(typename E::Element)), E::STAGE, states_of(C), 0};
}

template <class E, Cell C>
__global__ void __launch_bounds__(BLOCK_THREADS, 1)
    backward_kernel(const __grid_constant__ GatedBackward p, const __grid_constant__ Layout layout) {
  // dh[t] = clip(dy[t] + dh' + dq[t+1] W_hh);  dx[t], dq[t] = cell's backward of it;  dh' from h[t] past dq[t]
  // dq of a step before which the state was reset is left as 0 in the exchange: it goes no further.
  constexpr int G = gates_of(C);
  using Element = typename E::Element;
  const int units = p.plan.units, places = p.plan.rows * units;
  char* memory = shared_memory();
  Block<E> block(p, layout);
  Product<E> product(layout, memory);
  float* dh = reinterpret_cast<float*>(memory + layout.h);  // without what comes through q
  float* dc = reinterpret_cast<float*>(memory + layout.c);
  int* steps = reinterpret_cast<int*>(memory + layout.lengths);

  const Element* weight_hh = static_cast<const Element*>(p.weight_hh.data);
  product.template fill<true>([&](int row, int64_t k) {
    const int64_t n = block.unit(row), left = G * p.H - k;
    if (row >= units || n >= p.H) return uint4{};
    return gather<Element>([&](int i) { return i < left ? weight_hh[(k + i) * p.H + n] : Element(0); });
  });
  for (int i = threadIdx.x; i < p.plan.rows; i += BLOCK_THREADS) steps[i] = int(block.steps(block.place(i * units).b));
  for (int i = threadIdx.x; i < places; i += BLOCK_THREADS) {
    const Place at = block.place(i);
    if (!at.inside) continue;
    dh[i] = load(p.grad_h_n, at.b * p.H + at.n);
    if (C == Cell::lstm) dc[i] = load(p.grad_c_n, at.b * p.H + at.n);
  }
  __syncthreads();

  // The step past the last is that of the initial states' gradients.
  const bool initial = p.grad_h0.data != nullptr || p.grad_c0.data != nullptr;
  for (int64_t step = 0; step < p.T + initial; ++step) {
    Inputs<C> in;
    if (int(threadIdx.x) < places) {
      const Place first = block.place(threadIdx.x);
      in = inputs<E, C>(p, block, first, step, steps[first.row]);
    }
    if (step < p.T) {
      const int64_t t = time_of(p, step), earlier = p.reverse ? t + 1 : t - 1;
      block.template prefetch_later<kept_of(C)>(p.gates, Dtype::float32, t, steps);
      if (p.grad_output.data) block.template prefetch_later<1>(p.grad_output, p.dtype, t, steps);
      if (C == Cell::gru) block.template prefetch_later<1>(p.output, p.dtype, earlier, steps);
      if (C == Cell::lstm) {
        block.template prefetch_later<1>({p.cells, p.B * p.H, p.H}, Dtype::float32, earlier, steps);
      }
    }
    if (step > 0) block.wait();
    for (int row0 = 0; row0 < p.plan.rows; row0 += BATCH) {
      const int rows = p.plan.rows - row0 < BATCH ? p.plan.rows - row0 : BATCH;
      if (row0 > 0) __syncthreads();
      if (step > 0) product.run(block.exchanged(step - 1, row0), rows / COLUMN_TILE);
      __syncthreads();
      for (int i = row0 * units + threadIdx.x; i < (row0 + rows) * units; i += BLOCK_THREADS) {
        const Place at = block.place(i);
        if (i != int(threadIdx.x)) in = inputs<E, C>(p, block, at, step, steps[at.row]);
        if (!at.inside) continue;
        float grad = dh[i];
        if (step > 0) grad += product.sum(at.unit, at.row - row0);
        if (step == p.T) {
          store(p.grad_h0, at.b * p.H + at.n, grad);
          if (C == Cell::lstm) store(p.grad_c0, at.b * p.H + at.n, dc[i]);
          continue;
        }
        Gradients<C> d{};
        if (in.valid) {
          const float dc_new = C == Cell::lstm ? clamp_symmetric(dc[i], p.grad_clip) : 0.0f;
          const float dh_new = clamp_symmetric(grad + value_of(in.grad_output[0], p.dtype), p.grad_clip);
          const Shares of_h = zoneout_backward(p.keep_h, in.keep_h, p.zoneout_h, dh_new);
          const Shares of_c = zoneout_backward(p.keep_c, in.keep_c, p.zoneout_c, dc_new);
          d = cell_backward<C>(p, in, of_h.fresh, of_c.fresh);
          grad = in.reset ? 0.0f : of_h.old + d.h;
          if (C == Cell::lstm) dc[i] = in.reset ? 0.0f : of_c.old + d.c;
        }
        dh[i] = grad;
        for (int g = 0; g < G; ++g) block.leave(step, at.row, g * p.H + at.n, in.reset ? 0.0f : d.q[g]);
        const int64_t t = time_of(p, step);
        for (int g = 0; g < G; ++g) {
          block.put(p.grad_x, t, at, d.x[g], g);
          if (p.grad_q.data) {
            store({p.grad_q.data, p.weight_hh.dtype},
                  t * p.grad_q.stride_t + at.b * p.grad_q.stride_b + g * p.H + at.n, d.q[g]);
          }
        }
      }
    }
    if (step + 1 < p.T + initial) block.arrive();
  }
}

}  // namespace
}  // namespace RECATTN_ISA

using namespace RECATTN_ISA;

void gated_backward(const GatedBackward& p, cudaStream_t stream) {
  by_kernel(p, [&]<class E, Cell C>() {
    launch(backward_kernel<E, C>, p, layout_of<E, C>(p), stream, "gated: the backward kernel");
  });
}

}  // namespace recattn
