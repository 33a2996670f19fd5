// recattn_kernels._cpu: the CPU kernels as functions of integers (pointers, sizes, strides). The caller, an op's cpp.py,
// has checked every argument; nothing is checked again here. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace recattn;

namespace {

struct Isa {
  const char* name;
  bool supported;
  void (*indrnn_forward)(const IndrnnForward&);
  void (*indrnn_backward)(const IndrnnBackward&);
  void (*gated_forward)(const GatedForward&);
  void (*gated_backward)(const GatedBackward&);
};

// Widest last.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> table = {
#define RECATTN_ISA_ROW(name, ns, supported) \
  {name, supported, ns::indrnn_forward, ns::indrnn_backward, ns::gated_forward, ns::gated_backward}
#ifdef __x86_64__
      RECATTN_ISA_ROW("x86-64", isa_base, true),
      RECATTN_ISA_ROW("avx2", isa_v3,
                      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")),
      RECATTN_ISA_ROW("avx512", isa_v4,
                      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl")),
#else
      RECATTN_ISA_ROW("generic", isa_base, true),
#endif
#undef RECATTN_ISA_ROW
  };
  return table;
}

const Isa*& current() {
  static const Isa* chosen = [] {
    const Isa* widest = &isas().front();
    for (const Isa& isa : isas())
      if (isa.supported) widest = &isa;
    return widest;
  }();
  return chosen;
}

void set_capability(const std::string& name) {
  for (const Isa& isa : isas()) {
    if (isa.name == name && isa.supported) {
      current() = &isa;
      return;
    }
  }
  throw std::invalid_argument("capability '" + name + "' is unknown or not of this machine");
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.push_back(isa.name);
  return names;
}

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Strided = std::tuple<uintptr_t, int64_t, int64_t>;

Sequence sequence(const Strided& s) { return {pointer(std::get<0>(s)), std::get<1>(s), std::get<2>(s)}; }

template <class P>
P common(const std::tuple<int64_t, int64_t, int64_t>& sizes, int dtype, int activation, double negative_slope,
         uintptr_t weight_hh, uintptr_t h0, const Strided& reset, uintptr_t lengths, bool reverse, int threads) {
  P p{};
  std::tie(p.T, p.B, p.H) = sizes;
  p.dtype = Dtype(dtype);
  p.activation = Activation(activation);
  p.negative_slope = negative_slope;
  p.weight_hh = pointer(weight_hh);
  p.h0 = pointer(h0);
  p.reset = pointer<uint8_t>(std::get<0>(reset));
  p.reset_stride_t = std::get<1>(reset);
  p.reset_stride_b = std::get<2>(reset);
  p.lengths = pointer<int64_t>(lengths);
  p.reverse = reverse;
  p.threads = threads;
  return p;
}

// options: bias_hh, ln_weight, ln_bias, ln_c_weight, ln_c_bias. states: h0, c0. zoneout: the rates of h and c, then
// their masks.
using Options = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
using Pair = std::tuple<uintptr_t, uintptr_t>;
using Zoneouts = std::tuple<double, double, Strided, Strided>;

template <class P>
P gated(const std::tuple<int64_t, int64_t, int64_t>& sizes, int dtype, int cell, uintptr_t weight_hh,
        const Options& options, const Pair& states, const Strided& reset, uintptr_t lengths, bool reverse,
        const Zoneouts& zoneout, int threads) {
  P p{};
  std::tie(p.T, p.B, p.H) = sizes;
  p.dtype = Dtype(dtype);
  p.cell = Cell(cell);
  p.weight_hh = pointer(weight_hh);
  p.bias_hh = pointer(std::get<0>(options));
  p.ln_weight = pointer(std::get<1>(options));
  p.ln_bias = pointer(std::get<2>(options));
  p.ln_c_weight = pointer(std::get<3>(options));
  p.ln_c_bias = pointer(std::get<4>(options));
  p.h0 = pointer(std::get<0>(states));
  p.c0 = pointer(std::get<1>(states));
  p.reset = pointer<uint8_t>(std::get<0>(reset));
  p.reset_stride_t = std::get<1>(reset);
  p.reset_stride_b = std::get<2>(reset);
  p.lengths = pointer<int64_t>(lengths);
  p.reverse = reverse;
  p.zoneout_h = std::get<0>(zoneout);
  p.zoneout_c = std::get<1>(zoneout);
  const Strided &keep_h = std::get<2>(zoneout), &keep_c = std::get<3>(zoneout);
  p.keep_h = pointer<uint8_t>(std::get<0>(keep_h));
  p.keep_h_stride_t = std::get<1>(keep_h);
  p.keep_h_stride_b = std::get<2>(keep_h);
  p.keep_c = pointer<uint8_t>(std::get<0>(keep_c));
  p.keep_c_stride_t = std::get<1>(keep_c);
  p.keep_c_stride_b = std::get<2>(keep_c);
  p.threads = threads;
  return p;
}

// gates, cells, normed, rstd
using Kept = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

template <class P>
void set_kept(P& p, const Kept& kept) {
  p.gates = pointer(std::get<0>(kept));
  p.cells = pointer(std::get<1>(kept));
  p.normed = pointer(std::get<2>(kept));
  p.rstd = pointer(std::get<3>(kept));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("capability", [] { return current()->name; });
  m.def("capabilities", [] {
    py::tuple names(capabilities().size());
    for (size_t i = 0; i < names.size(); ++i) names[i] = capabilities()[i];
    return names;
  });
  m.def("set_capability", &set_capability);

  m.def("indrnn_forward", [](std::tuple<int64_t, int64_t, int64_t> sizes, int dtype, int activation, double slope,
                             uintptr_t weight_hh, uintptr_t h0, Strided reset, uintptr_t lengths, bool reverse,
                             int threads, uintptr_t bias, Strided x, Strided output, uintptr_t h_n) {
    auto p = common<IndrnnForward>(sizes, dtype, activation, slope, weight_hh, h0, reset, lengths, reverse, threads);
    p.bias = pointer(bias);
    p.x = sequence(x);
    p.output = sequence(output);
    p.h_n = pointer(h_n);
    py::gil_scoped_release release;
    current()->indrnn_forward(p);
  });

  m.def("indrnn_backward", [](std::tuple<int64_t, int64_t, int64_t> sizes, int dtype, int activation, double slope,
                              uintptr_t weight_hh, uintptr_t h0, Strided reset, uintptr_t lengths, bool reverse,
                              int threads, double grad_clip, Strided grad_output, Strided output,
                              uintptr_t grad_h_n, Strided grad_x, uintptr_t grad_h0, uintptr_t grad_columns,
                              uintptr_t grad_weight_hh, uintptr_t grad_bias) {
    auto p = common<IndrnnBackward>(sizes, dtype, activation, slope, weight_hh, h0, reset, lengths, reverse, threads);
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
    current()->indrnn_backward(p);
  });

  // The arguments are tuples by kind: beyond the sizes and pointers that every cell has, most are optional.
  m.def("gated_forward", [](std::tuple<int64_t, int64_t, int64_t> sizes, int dtype, int cell, uintptr_t weight_hh,
                            Options options, Pair states, Strided reset, uintptr_t lengths, bool reverse,
                            Zoneouts zoneout, int threads, Strided x, Strided output, Pair last_states, Kept kept) {
    auto p = gated<GatedForward>(sizes, dtype, cell, weight_hh, options, states, reset, lengths, reverse, zoneout,
                                 threads);
    p.x = sequence(x);
    p.output = sequence(output);
    p.h_n = pointer(std::get<0>(last_states));
    p.c_n = pointer(std::get<1>(last_states));
    set_kept(p, kept);
    py::gil_scoped_release release;
    current()->gated_forward(p);
  });

  // grad_options: as options.
  m.def("gated_backward", [](std::tuple<int64_t, int64_t, int64_t> sizes, int dtype, int cell, uintptr_t weight_hh,
                             Options options, Pair states, Strided reset, uintptr_t lengths, bool reverse,
                             Zoneouts zoneout, int threads, double grad_clip, Strided grad_output, Strided output,
                             Pair grad_last_states, Kept kept, Strided grad_x, uintptr_t grad_r, Pair grad_states,
                             uintptr_t grad_weight_hh, Options grad_options) {
    auto p = gated<GatedBackward>(sizes, dtype, cell, weight_hh, options, states, reset, lengths, reverse, zoneout,
                                  threads);
    p.grad_clip = grad_clip;
    p.grad_output = sequence(grad_output);
    p.output = sequence(output);
    p.grad_h_n = pointer(std::get<0>(grad_last_states));
    p.grad_c_n = pointer(std::get<1>(grad_last_states));
    set_kept(p, kept);
    p.grad_x = sequence(grad_x);
    p.grad_r = pointer(grad_r);
    p.grad_h0 = pointer(std::get<0>(grad_states));
    p.grad_c0 = pointer(std::get<1>(grad_states));
    p.grad_weight_hh = pointer(grad_weight_hh);
    p.grad_bias_hh = pointer(std::get<0>(grad_options));
    p.grad_ln_weight = pointer(std::get<1>(grad_options));
    p.grad_ln_bias = pointer(std::get<2>(grad_options));
    p.grad_ln_c_weight = pointer(std::get<3>(grad_options));
    p.grad_ln_c_bias = pointer(std::get<4>(grad_options));
    py::gil_scoped_release release;
    current()->gated_backward(p);
  });
}
