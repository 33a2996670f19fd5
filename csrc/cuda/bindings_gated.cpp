// rnn, lstm and gru of recattn_kernels._cuda. See bindings.cpp.
#include "bindings.h"

namespace recattn {
namespace {

// What both directions of the gated cells take.
using GatedCommon = std::tuple<std::tuple<int64_t, int64_t, int64_t>, int, int, bool, Typed,
                               std::tuple<Typed, Typed, Typed, Typed>, Strided, uintptr_t, bool,
                               std::tuple<double, double>, Strided, Strided,
                               std::tuple<int, int, int, int, int64_t, int64_t, bool>, uintptr_t>;

// What a forward keeps, in the order of recattn_kernels/ops/gated/contract.py's Kept.
using Kept = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

Mask mask(const Strided& s) { return {pointer<uint8_t>(std::get<0>(s)), std::get<1>(s), std::get<2>(s)}; }

template <class P>
P gated(const GatedCommon& common) {
  P p{};
  const auto& [sizes, cell, dtype, tf32, weight_hh, layer_norm, reset, lengths, reverse, zoneout, keep_h, keep_c, plan,
               workspace] = common;
  std::tie(p.T, p.B, p.H) = sizes;
  p.cell = Cell(cell);
  p.dtype = Dtype(dtype);
  p.tf32 = tf32;
  p.weight_hh = plain(weight_hh);
  p.ln_weight = plain(std::get<0>(layer_norm));
  p.ln_bias = plain(std::get<1>(layer_norm));
  p.ln_c_weight = plain(std::get<2>(layer_norm));
  p.ln_c_bias = plain(std::get<3>(layer_norm));
  p.reset = mask(reset);
  p.lengths = pointer<int64_t>(lengths);
  p.reverse = reverse;
  p.zoneout_h = float(std::get<0>(zoneout));
  p.zoneout_c = float(std::get<1>(zoneout));
  p.keep_h = mask(keep_h);
  p.keep_c = mask(keep_c);
  std::tie(p.plan.units, p.plan.rows, p.plan.slices, p.plan.groups, p.plan.shared, p.plan.workspace, p.plan.cluster) =
      plan;
  p.workspace = pointer(workspace);
  return p;
}

}  // namespace

void bind_gated(py::module_& m) {
  m.def("gated_clusters", &gated_clusters);

  m.def("gated_forward", [](const GatedCommon& common, uintptr_t stream, Typed bias_hh, Typed h0, Typed c0, Strided x,
                            Strided output, Typed h_n, Typed c_n, Kept kept) {
    auto p = gated<GatedForward>(common);
    p.bias_hh = plain(bias_hh);
    p.h0 = plain(h0);
    p.c0 = plain(c0);
    p.x = sequence(x);
    p.output = sequence(output);
    p.h_n = plain(h_n);
    p.c_n = plain(c_n);
    p.gates = pointer<float>(std::get<0>(kept));
    p.cells = pointer<float>(std::get<1>(kept));
    p.normed = pointer<float>(std::get<2>(kept));
    p.rstd = pointer<float>(std::get<3>(kept));
    gated_forward(p, static_cast<cudaStream_t>(pointer(stream)));
  }, py::call_guard<py::gil_scoped_release>());

  m.def("gated_backward", [](const GatedCommon& common, uintptr_t stream, double grad_clip, Typed h0, Typed c0,
                             Strided grad_output, Strided output, Strided gates, Kept kept, Strided grad_x,
                             Strided grad_q, Typed grad_h_n, Typed grad_c_n, Typed grad_h0, Typed grad_c0,
                             uintptr_t sums) {
    auto p = gated<GatedBackward>(common);
    p.grad_clip = float(grad_clip);
    p.h0 = plain(h0);
    p.c0 = plain(c0);
    p.grad_output = sequence(grad_output);
    p.output = sequence(output);
    p.gates = sequence(gates);
    p.cells = pointer<float>(std::get<1>(kept));
    p.normed = pointer<float>(std::get<2>(kept));
    p.rstd = pointer<float>(std::get<3>(kept));
    p.grad_x = sequence(grad_x);
    p.grad_q = sequence(grad_q);
    p.grad_h_n = plain(grad_h_n);
    p.grad_c_n = plain(grad_c_n);
    p.grad_h0 = plain(grad_h0);
    p.grad_c0 = plain(grad_c0);
    p.sums = pointer<float>(sums);
    gated_backward(p, static_cast<cudaStream_t>(pointer(stream)));
  }, py::call_guard<py::gil_scoped_release>());
}

}  // namespace recattn
