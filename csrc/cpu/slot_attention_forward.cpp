// Slot attention, forward: one pass over keys and values, a block of inputs at a time.
//
//   A[k, n] = softmax over k of scale * q[k] . k[n] + bias[k]
//   updates[k] = sum over n of (A[k, n] + eps) v[n] / den[k],  den[k] = sum over n of (A[k, n] + eps)
#include "slot_tile.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

template <class R>
struct Forward {
  Forward(const Plan<R>& plan, Workspace& memory, const SlotAttentionForward* p, R* sums)
      : plan(plan), p(*p), tile(plan, memory), sums(sums) {}

  void run(int64_t task) {
    const Sums<R> sum(plan, plan.Dv, sums, task);
    memset(sum.products, 0, Sums<R>::size(plan, plan.Dv) * sizeof(R));
    tile.begin(task / plan.parts);
    if (tile.rows() == 0) return;
    tile.each_block(task % plan.parts, [&](const Inputs& inputs) {
      tile.ahead.clear();
      tile.look_ahead(p.k, p.D, inputs);
      tile.look_ahead(p.v, p.Dv, inputs);
      tile.attend(inputs);
      if (p.attn.data) write_attn(inputs);
      add_rows(tile.a, tile.rows(), inputs.count, p.denominator ? R(0) : R(p.eps), sum.lanes);
      for (int64_t h = 0; h < plan.group; ++h) {
        const Block<R> v = tile.values(h, inputs);
        product(tile.a + h * tile.active * BLOCK, BLOCK, tile.active, v.data, v.step, inputs.count,
                sum.products + h * tile.active * plan.Dv, plan.Dv, plan.Dv, false, tile.ahead);
      }
    });
  }

  void write_attn(const Inputs& inputs) {
    for (int64_t r = 0; r < tile.rows(); ++r) {
      const int64_t row = tile.slot(r) * p.N;
      inputs.each_run([&](int64_t i, int64_t n) { write(p.attn, row + inputs[i], tile.a + r * BLOCK + i, n); });
    }
  }

  const Plan<R>& plan;
  const SlotAttentionForward& p;
  Tile<R> tile;
  R* const sums;
};

// updates = sums of the parts / den
template <class R>
struct Finish {
  Finish(const Plan<R>& plan, Workspace& memory, const SlotAttentionForward* p, R* sums)
      : plan(plan), p(*p), tile(plan, memory), sums(sums) {}

  void run(int64_t s) {
    tile.begin(s);
    const int64_t first = (tile.b * p.heads + tile.head) * p.K;
    memset(static_cast<R*>(p.updates) + first * p.Dv, 0, plan.rows * p.Dv * sizeof(R));
    memset(static_cast<R*>(p.den) + first, 0, plan.rows * sizeof(R));
    for (int64_t r = 0; r < tile.rows(); ++r) {
      R* const updates = static_cast<R*>(p.updates) + tile.slot(r) * p.Dv;
      R den = p.denominator ? R(p.eps) : R(0);
      for (int64_t i = 0; i < plan.parts; ++i) {
        const Sums<R> sum(plan, plan.Dv, sums, s * plan.parts + i);
        den += sum_lanes(sum.lanes + r * LANES<R>);
        for (int64_t d = 0; d < p.Dv; ++d) updates[d] += sum.products[r * plan.Dv + d];
      }
      static_cast<R*>(p.den)[tile.slot(r)] = den;
      for (int64_t d = 0; d < p.Dv; ++d) updates[d] /= den == 0 ? R(1) : den;
    }
  }

  const Plan<R>& plan;
  const SlotAttentionForward& p;
  Tile<R> tile;
  R* const sums;
};

template <class R>
void run(const SlotAttentionForward& p) {
  const Plan<R> plan(p);
  sum_parts<Forward<R>, Finish<R>>(plan, p, plan.Dv, plan.tile_bytes(), true);
}

}  // namespace

void slot_attention_forward(const SlotAttentionForward& p) { p.wide ? run<double>(p) : run<float>(p); }

}  // namespace RECATTN_ISA
}  // namespace recattn
