// Slot attention, backward: one pass over keys and values, which computes A anew. With g[k] = dupdates[k] / den[k] and
// delta[k] = g[k] . updates[k]:
//
//   dA[k, n] = g[k] . v[n] - delta[k] + dattn[k, n]      dS = A * (dA - sum over j of A[j, n] dA[j, n])
//   dv[n] = sum over k of (A + eps) g[k]     dk[n] = scale * sum over k of dS q[k]
//   dq[k] = scale * sum over n of dS k[n]    dbias[k] = sum over n of dS            (denominator: dv of A alone)
//
// dk and dv are the sums of those of all calls. A head's rows are first q of every call, then g of every call: where v
// is k, both take one product with a block, and one gives its gradient.
#include "slot_tile.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

template <class R>
struct Backward {
  static int64_t bytes(const Plan<R>& plan, const SlotAttentionBackward& p) {
    const int64_t rows = p.times * plan.rows;
    return plan.sample_bytes() + Workspace::bytes<R>(rows * (plan.D + plan.Dv)) + 2 * Workspace::bytes<R>(rows) +
           Workspace::bytes<R>(2 * rows * BLOCK) + Workspace::bytes<R>(BLOCK * plan.wider());
  }

  Backward(const Plan<R>& plan, Workspace& memory, const SlotAttentionBackward* p, R* sums)
      : plan(plan), p(*p), shared(!p->v.data), flows(p->grad_updates.data), sample(plan, memory), sums(sums),
        vectors(memory.take<R>(p->times * plan.rows * (plan.D + plan.Dv))), bias(memory.take<R>(p->times * plan.rows)),
        delta(memory.take<R>(p->times * plan.rows)), tile(memory.take<R>(2 * p->times * plan.rows * BLOCK)),
        out(memory.take<R>(BLOCK * plan.wider())) {}

  void run(int64_t task) {
    const Sums<R> sum(plan, plan.D, sums, task);
    memset(sum.products, 0, Sums<R>::size(plan, plan.D) * sizeof(R));
    sample.begin(task / plan.parts);
    if (sample.rows() == 0) return;
    for (int64_t call = 0; call < p.times; ++call) take(call);
    sample.each_block(task % plan.parts, [&](const Inputs& inputs) {
      sample.ahead.clear();
      sample.look_ahead(p.k, p.D, inputs);
      sample.look_ahead(p.v, p.Dv, inputs);
      sample.look_ahead(p.grad_k, p.D, inputs);
      sample.look_ahead(p.grad_v, p.Dv, inputs);
      for (int64_t h = 0; h < plan.group; ++h) score(h, inputs);
      for (int64_t call = 0; call < p.times; ++call) through_softmax(call, inputs);
      for (int64_t h = 0; h < plan.group; ++h) {
        slots_grads(h, inputs, sum);
        inputs_grads(h, inputs);
      }
    });
  }

 private:
  // Of a head: its rows of one kind in all calls; and where they begin.
  int64_t rows() const { return p.times * sample.active; }
  R* q(int64_t h) const { return vectors + h * rows() * (plan.D + plan.Dv); }
  R* g(int64_t h) const { return q(h) + rows() * plan.D; }
  R* s(int64_t h) const { return tile + h * 2 * rows() * BLOCK; }  // S, then dS
  R* da(int64_t h) const { return s(h) + rows() * BLOCK; }         // dA, then A + eps

  // q times scale, g and delta of a call's slots.
  void take(int64_t call) {
    for (int64_t i = 0; i < sample.rows(); ++i) {
      const int64_t slot = call * p.B * p.heads * p.K + sample.slot(i), h = i / sample.active,
                    r = call * sample.active + i % sample.active;
      const R* const from = at<R>(p.q, slot);
      R* const query = q(h) + r * plan.D;
      for (int64_t d = 0; d < plan.D; ++d) query[d] = d < p.D ? from[d] * R(p.scale) : R(0);
      bias[h * rows() + r] = p.bias.data ? *at<R>(p.bias, slot) : R(0);
      if (!flows) continue;
      const R *const du = at<R>(p.grad_updates, slot), *const u = at<R>(p.updates, slot), den = *at<R>(p.den, slot);
      R* const flow = g(h) + r * plan.Dv;
      R sum = 0;
      for (int64_t d = 0; d < plan.Dv; ++d) {
        flow[d] = d < p.Dv && den != 0 ? du[d] / den : R(0);
        if (d < p.Dv) sum += flow[d] * u[d];
      }
      delta[h * rows() + r] = sum;
    }
  }

  // S and g . v of a block, of head h.
  void score(int64_t h, const Inputs& inputs) {
    const auto times = [&](const R* vectors, int64_t count, int64_t width, const R* columns, R* to) {
      product(vectors, width, count, columns, BLOCK, width, to, BLOCK, BLOCK, true, sample.ahead);
    };
    sample.turn(sample.keys(h, inputs), inputs.count, plan.D, sample.k_columns);
    times(q(h), shared && flows ? 2 * rows() : rows(), plan.D, sample.k_columns, s(h));
    if (!flows) {
      memset(da(h), 0, rows() * BLOCK * sizeof(R));
    } else if (!shared) {
      sample.turn(sample.values(h, inputs), inputs.count, plan.Dv, sample.v_columns);
      times(g(h), rows(), plan.Dv, sample.v_columns, da(h));
    }
  }

  // Of a call, S becomes dS, and g . v becomes A + eps.
  void through_softmax(int64_t call, const Inputs& inputs) {
    const int64_t first = call * sample.active, step = 2 * rows() * BLOCK;  // from a head's rows to the next head's
    R *const s = tile + first * BLOCK, *const da = s + rows() * BLOCK;
    const R *const bias = this->bias + first, *const delta = this->delta + first;
    softmax(s, bias, plan.group, sample.active, step, rows());
    if (p.grad_attn.data) add_grad_attn(inputs);
    const R eps = p.denominator ? R(0) : R(p.eps);
    R along[BLOCK] = {};
    for (int64_t h = 0; h < plan.group; ++h) {
      for (int64_t i = 0; i < sample.active; ++i) {
        const R *const a = s + h * step + i * BLOCK, less = flows ? delta[h * rows() + i] : R(0);
        R* const d = da + h * step + i * BLOCK;
        for (int64_t n = 0; n < BLOCK; ++n) d[n] -= less;
        for (int64_t n = 0; n < BLOCK; ++n) along[n] += a[n] * d[n];
      }
    }
    for (int64_t h = 0; h < plan.group; ++h) {
      for (int64_t i = h * step; i < h * step + sample.active * BLOCK; i += BLOCK) {
        for (int64_t n = 0; n < BLOCK; ++n) {
          const R a = s[i + n];
          s[i + n] = a * (da[i + n] - along[n]);
          da[i + n] = a + eps;
        }
      }
    }
  }

  // Of the one call.
  void add_grad_attn(const Inputs& inputs) {
    R grad[BLOCK];
    for (int64_t r = 0; r < sample.rows(); ++r) {
      const int64_t row = sample.slot(r) * p.N;
      R* const to = da(r / sample.active) + r % sample.active * BLOCK;
      inputs.each_run([&](int64_t i, int64_t n) { read(grad + i, p.grad_attn, row + inputs[i], n); });
      for (int64_t n = 0; n < inputs.count; ++n) to[n] += grad[n];
    }
  }

  // What a block adds to dq and dbias of head h, of the one call.
  void slots_grads(int64_t h, const Inputs& inputs, const Sums<R>& sum) {
    const int64_t first = h * sample.active;
    if (p.grad_bias) add_rows(s(h), sample.active, inputs.count, R(0), sum.lanes + first * LANES<R>);
    if (!p.grad_q) return;
    const Block<R> k = sample.keys(h, inputs);
    product(s(h), BLOCK, sample.active, k.data, k.step, inputs.count, sum.products + first * plan.D, plan.D, plan.D,
            false, sample.ahead);
  }

  // dk and dv of a block, of head h.
  void inputs_grads(int64_t h, const Inputs& inputs) {
    if (shared) return grads(p.grad_k, h, p.D, plan.D, inputs, s(h), q(h), flows ? 2 * rows() : rows());
    grads(p.grad_k, h, p.D, plan.D, inputs, s(h), q(h), rows());
    grads(p.grad_v, h, p.Dv, plan.Dv, inputs, da(h), g(h), flows ? rows() : 0);
  }

  // gradient[n] = sum over rows of weights[row][n] * vectors[row]
  void grads(const Rows& t, int64_t h, int64_t width, int64_t padded_width, const Inputs& inputs, const R* weights,
             const R* vectors, int64_t count) {
    if (!t.data) return;
    const Block<R> to = sample.target(t, h, width, padded_width, inputs, out);
    if (p.add && to.data == out) {
      for (int64_t i = 0; i < inputs.count; ++i) read(out + i * to.step, t, sample.offset(t, h, inputs[i]), width);
    }
    product<true>(weights, BLOCK, inputs.count, vectors, padded_width, count, const_cast<R*>(to.data), to.step,
                  padded_width, !p.add, sample.ahead);
    sample.store(t, h, width, inputs, to, out);
  }

  const Plan<R>& plan;
  const SlotAttentionBackward& p;
  const bool shared, flows;
  Sample<R> sample;
  R *const sums, *const vectors, *const bias, *const delta, *const tile, *const out;
};

// dq and dbias = sums of the parts
template <class R>
struct Finish {
  Finish(const Plan<R>& plan, Workspace& memory, const SlotAttentionBackward* p, R* sums)
      : plan(plan), p(*p), sample(plan, memory), sums(sums) {}

  void run(int64_t s) {
    sample.begin(s);
    const int64_t first = (sample.b * p.heads + sample.head) * p.K;
    if (p.grad_q) memset(static_cast<R*>(p.grad_q) + first * p.D, 0, plan.rows * p.D * sizeof(R));
    if (p.grad_bias) memset(static_cast<R*>(p.grad_bias) + first, 0, plan.rows * sizeof(R));
    for (int64_t r = 0; r < sample.rows(); ++r) {
      R* const q = static_cast<R*>(p.grad_q) + sample.slot(r) * p.D;
      R bias = 0;
      for (int64_t i = 0; i < plan.parts; ++i) {
        const Sums<R> sum(plan, plan.D, sums, s * plan.parts + i);
        bias += sum_lanes(sum.lanes + r * LANES<R>);
        for (int64_t d = 0; p.grad_q && d < p.D; ++d) q[d] += sum.products[r * plan.D + d];
      }
      for (int64_t d = 0; p.grad_q && d < p.D; ++d) q[d] *= R(p.scale);
      if (p.grad_bias) static_cast<R*>(p.grad_bias)[sample.slot(r)] = bias;
    }
  }

  const Plan<R>& plan;
  const SlotAttentionBackward& p;
  Sample<R> sample;
  R* const sums;
};

template <class R>
void run(const SlotAttentionBackward& p) {
  const Plan<R> plan(p);
  sum_parts<Backward<R>, Finish<R>>(plan, p, plan.D, Backward<R>::bytes(plan, p), p.grad_q || p.grad_bias);
}

}  // namespace

void slot_attention_backward(const SlotAttentionBackward& p) { p.wide ? run<double>(p) : run<float>(p); }

}  // namespace RECATTN_ISA
}  // namespace recattn
