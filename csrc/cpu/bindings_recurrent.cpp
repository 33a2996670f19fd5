// The recurrences, and the products of their layers.
#include <array>

#include "bindings.h"
#include "kernels.h"

namespace py = pybind11;

namespace recattn {
namespace {

using Strided = std::tuple<uintptr_t, int64_t, int64_t>;

Sequence sequence(const Strided& s) { return {pointer(std::get<0>(s)), std::get<1>(s), std::get<2>(s)}; }

Mask mask(const Strided& s) { return {pointer<uint8_t>(std::get<0>(s)), std::get<1>(s), std::get<2>(s)}; }

// What both directions of the IndRNN take, in one tuple: sizes, dtype, activation, its slope, weight_hh, h0, reset,
// lengths, reverse, threads.
using IndrnnArguments = std::tuple<std::tuple<int64_t, int64_t, int64_t>, int, int, double, uintptr_t, uintptr_t,
                                   Strided, uintptr_t, bool, int>;

template <class P>
P indrnn(const IndrnnArguments& arguments) {
  P p{};
  const auto& [sizes, dtype, activation, slope, weight_hh, h0, reset, lengths, reverse, threads] = arguments;
  std::tie(p.T, p.B, p.H) = sizes;
  p.dtype = Dtype(dtype);
  p.activation = Activation(activation);
  p.negative_slope = slope;
  p.weight_hh = pointer(weight_hh);
  p.h0 = pointer(h0);
  p.reset = mask(reset);
  p.lengths = pointer<int64_t>(lengths);
  p.reverse = reverse;
  p.threads = threads;
  return p;
}

using Four = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

// What both directions of a gated recurrence take, in one tuple: sizes, dtype, cell, weight_hh, bias_hh, layer norm, h0,
// c0, reset, lengths, starts, reverse, zoneout's rates and masks, threads.
using GatedArguments = std::tuple<std::tuple<int64_t, int64_t, int64_t>, int, int, uintptr_t, uintptr_t, Four, uintptr_t,
                                  uintptr_t, Strided, uintptr_t, uintptr_t, bool, std::tuple<double, double>, Strided,
                                  Strided, int>;

template <class P>
P gated(const GatedArguments& arguments) {
  P p{};
  const auto& [sizes, dtype, cell, weight_hh, bias_hh, norm, h0, c0, reset, lengths, starts, reverse, zoneout, keep_h,
               keep_c, threads] = arguments;
  std::tie(p.T, p.B, p.H) = sizes;
  p.dtype = Dtype(dtype);
  p.cell = Cell(cell);
  p.weight_hh = pointer(weight_hh);
  p.bias_hh = pointer(bias_hh);
  p.ln_weight = pointer(std::get<0>(norm));
  p.ln_bias = pointer(std::get<1>(norm));
  p.ln_c_weight = pointer(std::get<2>(norm));
  p.ln_c_bias = pointer(std::get<3>(norm));
  p.h0 = pointer(h0);
  p.c0 = pointer(c0);
  p.reset = mask(reset);
  p.lengths = pointer<int64_t>(lengths);
  p.starts = pointer<int64_t>(starts);
  p.reverse = reverse;
  std::tie(p.zoneout_h, p.zoneout_c) = zoneout;
  p.keep_h = mask(keep_h);
  p.keep_c = mask(keep_c);
  p.threads = threads;
  return p;
}

template <class P>
void set_kept(P& p, const Four& kept) {
  p.gates = pointer(std::get<0>(kept));
  p.cells = pointer(std::get<1>(kept));
  p.normed = pointer(std::get<2>(kept));
  p.rstd = pointer(std::get<3>(kept));
}

}  // namespace

void bind_recurrent(py::module_& m) {
  m.def("indrnn_forward", [](const IndrnnArguments& arguments, uintptr_t bias, Strided x, Strided output,
                             uintptr_t h_n) {
    auto p = indrnn<IndrnnForward>(arguments);
    p.bias = pointer(bias);
    p.x = sequence(x);
    p.output = sequence(output);
    p.h_n = pointer(h_n);
    py::gil_scoped_release release;
    RECATTN_RUN(indrnn_forward, p);
  });

  m.def("indrnn_backward", [](const IndrnnArguments& arguments, double grad_clip, Strided grad_output, Strided output,
                              uintptr_t grad_h_n, Strided grad_x, uintptr_t grad_h0, uintptr_t grad_columns,
                              uintptr_t grad_weight_hh, uintptr_t grad_bias) {
    auto p = indrnn<IndrnnBackward>(arguments);
    p.grad_clip = grad_clip;
    p.grad_output = sequence(grad_output);
    p.output = sequence(output);
    p.grad_h_n = pointer(grad_h_n);
    p.grad_x = sequence(grad_x);
    p.grad_h0 = pointer(grad_h0);
    p.grad_columns = pointer(grad_columns);
    p.grad_weight_hh = pointer(grad_weight_hh);
    p.grad_bias = pointer(grad_bias);
    py::gil_scoped_release release;
    RECATTN_RUN(indrnn_backward, p);
  });

  m.def("gemm", [](std::tuple<int64_t, int64_t, int64_t> sizes, int dtype, Strided a, Strided b,
                   std::tuple<uintptr_t, int64_t> c, uintptr_t bias, int threads) {
    Gemm p{};
    uintptr_t a_address, b_address, c_address;
    std::tie(p.M, p.N, p.K) = sizes;
    p.dtype = Dtype(dtype);
    std::tie(a_address, p.a_row, p.a_col) = a;
    std::tie(b_address, p.b_row, p.b_col) = b;
    std::tie(c_address, p.c_row) = c;
    p.a = pointer(a_address);
    p.b = pointer(b_address);
    p.c = pointer(c_address);
    p.bias = pointer(bias);
    p.threads = threads;
    py::gil_scoped_release release;
    RECATTN_RUN(gemm, p);
  });

  m.def("column_sum", [](std::tuple<int64_t, int64_t> sizes, int dtype, std::tuple<uintptr_t, int64_t> a, uintptr_t out,
                         int threads) {
    const auto [M, N] = sizes;
    const auto [address, row] = a;
    const ColumnSum p = {M, N, Dtype(dtype), pointer(address), row, pointer(out), threads};
    py::gil_scoped_release release;
    RECATTN_RUN(column_sum, p);
  });

  m.def("gated_forward", [](const GatedArguments& arguments, Strided x, Strided output, uintptr_t h_n, uintptr_t c_n,
                            const Four& kept) {
    auto p = gated<GatedForward>(arguments);
    p.x = sequence(x);
    p.output = sequence(output);
    p.h_n = pointer(h_n);
    p.c_n = pointer(c_n);
    set_kept(p, kept);
    py::gil_scoped_release release;
    RECATTN_RUN(gated_forward, p);
  });

  // grads: of weight_hh, h0, c0, bias_hh, and the layer norm's weight, bias, weight_c and bias_c.
  m.def("gated_backward", [](const GatedArguments& arguments, double grad_clip, Strided grad_output, Strided output,
                             uintptr_t grad_h_n, uintptr_t grad_c_n, const Four& kept, Strided grad_x, uintptr_t grad_q,
                             const std::array<uintptr_t, 8>& grads) {
    auto p = gated<GatedBackward>(arguments);
    p.grad_clip = grad_clip;
    p.grad_output = sequence(grad_output);
    p.output = sequence(output);
    p.grad_h_n = pointer(grad_h_n);
    p.grad_c_n = pointer(grad_c_n);
    set_kept(p, kept);
    p.grad_x = sequence(grad_x);
    p.grad_q = pointer(grad_q);
    p.grad_weight_hh = pointer(grads[0]);
    p.grad_h0 = pointer(grads[1]);
    p.grad_c0 = pointer(grads[2]);
    p.grad_bias_hh = pointer(grads[3]);
    p.grad_ln_weight = pointer(grads[4]);
    p.grad_ln_bias = pointer(grads[5]);
    p.grad_ln_c_weight = pointer(grads[6]);
    p.grad_ln_c_bias = pointer(grads[7]);
    py::gil_scoped_release release;
    RECATTN_RUN(gated_backward, p);
  });

  // A forward gives h and c_n; a backward, grads (grad_h, grad_c_n, grad_gates, grad_c).
  m.def("lstm_step", [](std::tuple<int64_t, int64_t> sizes, int dtype, int threads, std::tuple<uintptr_t, int64_t> gates,
                        uintptr_t c, uintptr_t h, uintptr_t c_n, const Four& grads) {
    LstmStep p{};
    std::tie(p.B, p.H) = sizes;
    p.dtype = Dtype(dtype);
    p.threads = threads;
    p.gates = pointer(std::get<0>(gates));
    p.gates_stride = std::get<1>(gates);
    p.c = pointer(c);
    p.h = pointer(h);
    p.c_n = pointer(c_n);
    p.grad_h = pointer(std::get<0>(grads));
    p.grad_c_n = pointer(std::get<1>(grads));
    p.grad_gates = pointer(std::get<2>(grads));
    p.grad_c = pointer(std::get<3>(grads));
    py::gil_scoped_release release;
    RECATTN_RUN(lstm_step, p);
  });

  // A forward gives h_n; a backward, grads (grad_h_n, grad_x_gates, grad_h_gates, grad_h).
  m.def("gru_step", [](std::tuple<int64_t, int64_t> sizes, int dtype, int threads, std::tuple<uintptr_t, int64_t> x_gates,
                       uintptr_t h_gates, uintptr_t h, uintptr_t h_n, const Four& grads) {
    GruStep p{};
    std::tie(p.B, p.H) = sizes;
    p.dtype = Dtype(dtype);
    p.threads = threads;
    p.x_gates = pointer(std::get<0>(x_gates));
    p.x_stride = std::get<1>(x_gates);
    p.h_gates = pointer(h_gates);
    p.h = pointer(h);
    p.h_n = pointer(h_n);
    p.grad_h_n = pointer(std::get<0>(grads));
    p.grad_x_gates = pointer(std::get<1>(grads));
    p.grad_h_gates = pointer(std::get<2>(grads));
    p.grad_h = pointer(std::get<3>(grads));
    py::gil_scoped_release release;
    RECATTN_RUN(gru_step, p);
  });
}

}  // namespace recattn
