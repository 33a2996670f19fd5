// Slot attention, backward: one pass over keys and values, which computes A anew. With g[k] = dupdates[k] / den[k] and
// delta[k] = g[k] . updates[k]:
//
//   dA[k, n] = g[k] . v[n] - delta[k] + dattn[k, n]      dS = A * (dA - sum over j of A[j, n] dA[j, n])
//   dv[n] = sum over k of (A + eps) g[k]     dk[n] = scale * sum over k of dS q[k]
//   dq[k] = scale * sum over n of dS k[n]    dbias[k] = sum over n of dS            (denominator: dv of A alone)
#include "slot_tile.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

template <class R>
struct Backward {
  static int64_t bytes(const Plan<R>& plan) {
    return Workspace::bytes<R>(plan.rows * plan.Dv) + Workspace::bytes<R>(plan.rows) +
           Workspace::bytes<R>(plan.rows * BLOCK) + Workspace::bytes<R>(BLOCK * (plan.D > plan.Dv ? plan.D : plan.Dv));
  }

  Backward(const Plan<R>& plan, Workspace& memory, const SlotAttentionBackward* p, R* sums)
      : plan(plan), p(*p), tile(plan, memory), sums(sums), g(memory.take<R>(plan.rows * plan.Dv)),
        delta(memory.take<R>(plan.rows)), ds(memory.take<R>(plan.rows * BLOCK)),
        out(memory.take<R>(BLOCK * (plan.D > plan.Dv ? plan.D : plan.Dv))) {}

  void run(int64_t task) {
    const Sums<R> sum(plan, plan.D, sums, task);
    memset(sum.products, 0, Sums<R>::size(plan, plan.D) * sizeof(R));
    tile.begin(task / plan.parts);
    if (tile.rows() == 0) return;
    if (p.grad_updates) flow_in();
    tile.each_block(task % plan.parts, [&](const Inputs& inputs) {
      tile.ahead.clear();
      tile.look_ahead(p.k, p.D, inputs);
      tile.look_ahead(p.v, p.Dv, inputs);
      tile.look_ahead(p.grad_k, p.D, inputs);
      tile.look_ahead(p.grad_v, p.Dv, inputs);
      tile.attend(inputs);
      through_softmax(inputs);
      add_rows(ds, tile.rows(), inputs.count, R(0), sum.lanes);
      for (int64_t h = 0; h < plan.group; ++h) {
        const int64_t at = h * tile.active;
        if (p.grad_q) {
          const Block<R> k = tile.keys(h, inputs);
          product(ds + at * BLOCK, BLOCK, tile.active, k.data, k.step, inputs.count, sum.products + at * plan.D, plan.D,
                  plan.D, false, tile.ahead);
        }
        inputs_grads(h, inputs);
      }
    });
  }

 private:
  // g and delta, for the sample's slots.
  void flow_in() {
    for (int64_t r = 0; r < tile.rows(); ++r) {
      const int64_t slot = tile.slot(r);
      const R *const du = static_cast<const R*>(p.grad_updates) + slot * p.Dv,
                     *const u = static_cast<const R*>(p.updates) + slot * p.Dv;
      const R den = static_cast<const R*>(p.den)[slot];
      R* const to = g + r * plan.Dv;
      R sum = 0;
      for (int64_t d = 0; d < plan.Dv; ++d) {
        to[d] = d < p.Dv && den != 0 ? du[d] / den : R(0);
        if (d < p.Dv) sum += to[d] * u[d];
      }
      delta[r] = sum;
    }
  }

  // ds = dS of a block.
  void through_softmax(const Inputs& inputs) {
    const int64_t rows = tile.rows();
    if (p.grad_updates) {
      for (int64_t h = 0; h < plan.group; ++h) {
        tile.scores(g + h * tile.active * plan.Dv, plan.Dv, tile.values(h, inputs), inputs.count, tile.v_columns,
                    ds + h * tile.active * BLOCK);
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < BLOCK; ++n) ds[r * BLOCK + n] -= delta[r];
      }
    } else {
      memset(ds, 0, rows * BLOCK * sizeof(R));
    }
    if (p.grad_attn.data) add_grad_attn(inputs);
    R along[BLOCK] = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < BLOCK; ++n) along[n] += tile.a[r * BLOCK + n] * ds[r * BLOCK + n];
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < BLOCK; ++n) {
        ds[r * BLOCK + n] = tile.a[r * BLOCK + n] * (ds[r * BLOCK + n] - along[n]);
      }
    }
  }

  void add_grad_attn(const Inputs& inputs) {
    R grad[BLOCK];
    for (int64_t r = 0; r < tile.rows(); ++r) {
      const int64_t row = tile.slot(r) * p.N;
      inputs.each_run([&](int64_t i, int64_t n) { read(grad + i, p.grad_attn, row + inputs[i], n); });
      for (int64_t n = 0; n < inputs.count; ++n) ds[r * BLOCK + n] += grad[n];
    }
  }

  // dk and dv of a block, of head h.
  void inputs_grads(int64_t h, const Inputs& inputs) {
    const int64_t at = h * tile.active;
    const bool shared = !p.v.data, flows = p.grad_updates != nullptr;
    if (flows && !p.denominator && (shared ? p.grad_k.data : p.grad_v.data)) {
      for (int64_t i = at * BLOCK; i < (at + tile.active) * BLOCK; ++i) tile.a[i] += R(p.eps);
    }
    if (p.grad_k.data) {
      const Block<R> to = target(p.grad_k, h, p.D, plan.D, inputs);
      R* const data = const_cast<R*>(to.data);
      product<true>(ds + at * BLOCK, BLOCK, inputs.count, tile.q + at * plan.D, plan.D, tile.active, data, to.step,
                      plan.D, true, tile.ahead);
      if (shared && flows) {
        product<true>(tile.a + at * BLOCK, BLOCK, inputs.count, g + at * plan.Dv, plan.Dv, tile.active, data, to.step,
                plan.Dv, false, tile.ahead);
      }
      store(p.grad_k, h, p.D, plan.D, inputs, to);
    }
    if (!shared && p.grad_v.data) {
      const Block<R> to = target(p.grad_v, h, p.Dv, plan.Dv, inputs);
      product<true>(tile.a + at * BLOCK, BLOCK, inputs.count, g + at * plan.Dv, plan.Dv, flows ? tile.active : 0,
                      const_cast<R*>(to.data), to.step, plan.Dv, true, tile.ahead);
      store(p.grad_v, h, p.Dv, plan.Dv, inputs, to);
    }
  }

  // Where a block's gradients are computed: in their tensor, if it is of R and its rows are whole vectors.
  Block<R> target(const Rows& t, int64_t h, int64_t width, int64_t padded_width, const Inputs& inputs) {
    const bool same = t.dtype == (sizeof(R) == 8 ? Dtype::float64 : Dtype::float32);
    if (same && width == padded_width && !inputs.at) {
      return {static_cast<const R*>(t.data) + tile.offset(t, h, inputs.first), t.stride_n};
    }
    return {out, padded_width};
  }
  void store(const Rows& t, int64_t h, int64_t width, int64_t padded_width, const Inputs& inputs,
             const Block<R>& from) {
    if (from.data != out) return;
    for (int64_t i = 0; i < inputs.count; ++i) {
      write(t, tile.offset(t, h, inputs[i]), out + i * padded_width, width);
    }
  }

  const Plan<R>& plan;
  const SlotAttentionBackward& p;
  Tile<R> tile;
  R* const sums;
  R *const g, *const delta, *const ds, *const out;
};

// dq and dbias = sums of the parts
template <class R>
struct Finish {
  Finish(const Plan<R>& plan, Workspace& memory, const SlotAttentionBackward* p, R* sums)
      : plan(plan), p(*p), tile(plan, memory), sums(sums) {}

  void run(int64_t s) {
    tile.begin(s);
    const int64_t first = (tile.b * p.heads + tile.head) * p.K;
    if (p.grad_q) memset(static_cast<R*>(p.grad_q) + first * p.D, 0, plan.rows * p.D * sizeof(R));
    if (p.grad_bias) memset(static_cast<R*>(p.grad_bias) + first, 0, plan.rows * sizeof(R));
    for (int64_t r = 0; r < tile.rows(); ++r) {
      R* const q = static_cast<R*>(p.grad_q) + tile.slot(r) * p.D;
      R bias = 0;
      for (int64_t i = 0; i < plan.parts; ++i) {
        const Sums<R> sum(plan, plan.D, sums, s * plan.parts + i);
        bias += sum_lanes(sum.lanes + r * LANES<R>);
        for (int64_t d = 0; p.grad_q && d < p.D; ++d) q[d] += sum.products[r * plan.D + d];
      }
      for (int64_t d = 0; p.grad_q && d < p.D; ++d) q[d] *= R(p.scale);
      if (p.grad_bias) static_cast<R*>(p.grad_bias)[tile.slot(r)] = bias;
    }
  }

  const Plan<R>& plan;
  const SlotAttentionBackward& p;
  Tile<R> tile;
  R* const sums;
};

template <class R>
void run(const SlotAttentionBackward& p) {
  const Plan<R> plan(p);
  sum_parts<Backward<R>, Finish<R>>(plan, p, plan.D, Backward<R>::bytes(plan), p.grad_q || p.grad_bias);
}

}  // namespace

void slot_attention_backward(const SlotAttentionBackward& p) { p.wide ? run<double>(p) : run<float>(p); }

}  // namespace RECATTN_ISA
}  // namespace recattn
