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
  void (*gemm)(const Gemm&);
  void (*column_sum)(const ColumnSum&);
};

// Widest last.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> table = {
#define RECATTN_ISA_ROW(name, ns, supported) \
  {name, supported, ns::indrnn_forward, ns::indrnn_backward, ns::gemm, ns::column_sum}
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
    current()->gemm(p);
  });

  m.def("column_sum", [](std::tuple<int64_t, int64_t> sizes, int dtype, std::tuple<uintptr_t, int64_t> a, uintptr_t out,
                         int threads) {
    const auto [M, N] = sizes;
    const auto [address, row] = a;
    const ColumnSum p = {M, N, Dtype(dtype), pointer(address), row, pointer(out), threads};
    py::gil_scoped_release release;
    current()->column_sum(p);
  });
}
