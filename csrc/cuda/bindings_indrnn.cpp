// IndRNN of recattn_kernels._cuda. See bindings.cpp.
#include "bindings.h"

namespace recattn {
namespace {

template <class P>
P common(const std::tuple<int64_t, int64_t, int64_t>& sizes, int dtype, int activation, double negative_slope,
         Typed weight_hh, Typed h0, const Strided& reset, uintptr_t lengths, bool reverse, bool scan) {
  P p{};
  std::tie(p.T, p.B, p.H) = sizes;
  p.dtype = Dtype(dtype);
  p.activation = Activation(activation);
  p.negative_slope = float(negative_slope);
  p.weight_hh = plain(weight_hh);
  p.h0 = plain(h0);
  p.reset = pointer<uint8_t>(std::get<0>(reset));
  p.reset_stride_t = std::get<1>(reset);
  p.reset_stride_b = std::get<2>(reset);
  p.lengths = pointer<int64_t>(lengths);
  p.reverse = reverse;
  p.scan = scan;
  return p;
}

}  // namespace

void bind_indrnn(py::module_& m) {
  m.def("indrnn_forward", [](std::tuple<int64_t, int64_t, int64_t> sizes, int dtype, int activation, double slope,
                             Typed weight_hh, Typed h0, Strided reset, uintptr_t lengths, bool reverse, bool scan,
                             uintptr_t stream, Typed bias, Strided x, Strided output, Typed h_n) {
    auto p = common<IndrnnForward>(sizes, dtype, activation, slope, weight_hh, h0, reset, lengths, reverse, scan);
    p.bias = plain(bias);
    p.x = sequence(x);
    p.output = sequence(output);
    p.h_n = plain(h_n);
    indrnn_forward(p, static_cast<cudaStream_t>(pointer(stream)));
  }, py::call_guard<py::gil_scoped_release>());

  m.def("indrnn_backward", [](std::tuple<int64_t, int64_t, int64_t> sizes, int dtype, int activation, double slope,
                              Typed weight_hh, Typed h0, Strided reset, uintptr_t lengths, bool reverse, bool scan,
                              uintptr_t stream, double grad_clip, Strided grad_output, Strided output, Typed grad_h_n,
                              Strided grad_x, Typed grad_h0, uintptr_t grad_columns, Typed grad_weight_hh,
                              Typed grad_bias) {
    auto p = common<IndrnnBackward>(sizes, dtype, activation, slope, weight_hh, h0, reset, lengths, reverse, scan);
    p.grad_clip = float(grad_clip);
    p.grad_output = sequence(grad_output);
    p.output = sequence(output);
    p.grad_h_n = plain(grad_h_n);
    p.grad_x = sequence(grad_x);
    p.grad_h0 = plain(grad_h0);
    p.grad_columns = pointer<float>(grad_columns);
    p.grad_weight_hh = plain(grad_weight_hh);
    p.grad_bias = plain(grad_bias);
    indrnn_backward(p, static_cast<cudaStream_t>(pointer(stream)));
  }, py::call_guard<py::gil_scoped_release>());
}

}  // namespace recattn
