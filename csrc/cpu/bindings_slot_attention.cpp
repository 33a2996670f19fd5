// Slot attention.
#include <array>

#include "bindings.h"
#include "slot_attention.h"
#include "slot_update.h"

namespace py = pybind11;

namespace recattn {
namespace {

// Address, dtype, strides over batch, heads and inputs.
using RowsArgument = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;

using SlotsArgument = std::tuple<uintptr_t, int64_t>;  // address, step

Slots slots(const SlotsArgument& a) { return {pointer(std::get<0>(a)), std::get<1>(a)}; }

Rows rows(const RowsArgument& a) {
  return {pointer(std::get<0>(a)), Dtype(std::get<1>(a)), std::get<2>(a), std::get<3>(a), std::get<4>(a)};
}

// What both directions take: sizes (B, heads, K, N, D, Dv), whether R is double, (scale, eps), (denominator, joint),
// threads, q, k, v, bias, slot_mask and input_mask.
using Arguments = std::tuple<std::array<int64_t, 6>, bool, std::array<double, 2>, std::array<bool, 2>, int,
                             SlotsArgument, RowsArgument, RowsArgument, SlotsArgument, uintptr_t, uintptr_t>;

template <class P>
P common(const Arguments& arguments) {
  P p{};
  const auto& [sizes, wide, numbers, flags, threads, q, k, v, bias, slot_mask, input_mask] = arguments;
  p.B = sizes[0], p.heads = sizes[1], p.K = sizes[2], p.N = sizes[3], p.D = sizes[4], p.Dv = sizes[5];
  p.wide = wide;
  p.scale = numbers[0], p.eps = numbers[1];
  p.denominator = flags[0], p.joint = flags[1];
  p.threads = threads;
  p.q = slots(q);
  p.k = rows(k), p.v = rows(v);
  p.bias = slots(bias);
  p.slot_mask = pointer<uint8_t>(slot_mask);
  p.input_mask = pointer<uint8_t>(input_mask);
  return p;
}

// Of an update of the slots: sizes (R, D, M), threads, eps; the inputs as slot_update.h lists them; what is kept.
using UpdateArguments =
    std::tuple<std::array<int64_t, 3>, int, float, std::array<uintptr_t, 12>, std::array<uintptr_t, 5>>;

template <class P>
P update(const UpdateArguments& arguments) {
  P p{};
  const auto& [sizes, threads, eps, inputs, kept] = arguments;
  p.R = sizes[0], p.D = sizes[1], p.M = sizes[2];
  p.threads = threads;
  p.eps = eps;
  const float** const read[] = {&p.updates, &p.slots, &p.weight_ih, &p.weight_hh, &p.bias_ih, &p.bias_hh,
                                &p.norm_weight, &p.norm_bias, &p.up, &p.up_bias, &p.down, &p.down_bias};
  for (size_t i = 0; i < inputs.size(); ++i) *read[i] = pointer<float>(inputs[i]);
  float** const written[] = {&p.x_gates, &p.h_gates, &p.normed, &p.rstd, &p.hidden};
  for (size_t i = 0; i < kept.size(); ++i) *written[i] = pointer<float>(kept[i]);
  return p;
}

}  // namespace

void bind_slot_attention(py::module_& m) {
  m.def("slot_attention_forward",
        [](const Arguments& arguments, uintptr_t updates, uintptr_t den, const RowsArgument& attn) {
          auto p = common<SlotAttentionForward>(arguments);
          p.updates = pointer(updates);
          p.den = pointer(den);
          p.attn = rows(attn);
          py::gil_scoped_release release;
          RECATTN_RUN(slot_attention_forward, p);
        });

  // flow: updates, den and grad_updates. grads: of q, bias (of R), k and v. add: to what those of k and v hold.
  m.def("slot_attention_backward",
        [](const Arguments& arguments, int64_t times, const std::array<SlotsArgument, 3>& flow,
           const RowsArgument& grad_attn, const std::tuple<uintptr_t, uintptr_t, RowsArgument, RowsArgument>& grads,
           bool add) {
          auto p = common<SlotAttentionBackward>(arguments);
          p.times = times;
          p.updates = slots(flow[0]), p.den = slots(flow[1]), p.grad_updates = slots(flow[2]);
          p.grad_attn = rows(grad_attn);
          p.grad_q = pointer(std::get<0>(grads));
          p.grad_bias = pointer(std::get<1>(grads));
          p.grad_k = rows(std::get<2>(grads));
          p.grad_v = rows(std::get<3>(grads));
          p.add = add;
          py::gil_scoped_release release;
          RECATTN_RUN(slot_attention_backward, p);
        });

  m.def("slot_update_forward", [](const UpdateArguments& arguments, uintptr_t result) {
    auto p = update<SlotUpdateForward>(arguments);
    p.result = pointer<float>(result);
    py::gil_scoped_release release;
    RECATTN_RUN(slot_update_forward, p);
  });

  // grads: in the order of the inputs, null where they are not wanted.
  m.def("slot_update_backward",
        [](const UpdateArguments& arguments, uintptr_t grad_result, const std::array<uintptr_t, 12>& grads) {
          auto p = update<SlotUpdateBackward>(arguments);
          p.grad_result = pointer<float>(grad_result);
          float** const wanted[] = {&p.grad_updates, &p.grad_slots, &p.grad_weight_ih, &p.grad_weight_hh,
                                    &p.grad_bias_ih, &p.grad_bias_hh, &p.grad_norm_weight, &p.grad_norm_bias,
                                    &p.grad_up, &p.grad_up_bias, &p.grad_down, &p.grad_down_bias};
          for (size_t i = 0; i < grads.size(); ++i) *wanted[i] = pointer<float>(grads[i]);
          py::gil_scoped_release release;
          RECATTN_RUN(slot_update_backward, p);
        });
}

}  // namespace recattn
