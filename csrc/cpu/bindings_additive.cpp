// Additive attention.
#include "additive.h"
#include "bindings.h"

namespace py = pybind11;

namespace recattn {
namespace {

using Strided = std::tuple<uintptr_t, int64_t, int64_t, int>;  // pointer, strides over b and n, dtype

// What both directions take, in one tuple: sizes, whether float64, activation, query, keys, weight, values, mask, threads.
using Arguments = std::tuple<std::tuple<int64_t, int64_t, int64_t, int64_t>, bool, int, uintptr_t, Strided, uintptr_t,
                             Strided, std::tuple<uintptr_t, int64_t, int64_t>, int>;

Positions positions(const Strided& s) {
  return {pointer(std::get<0>(s)), std::get<1>(s), std::get<2>(s), Dtype(std::get<3>(s))};
}

template <class P>
P additive(const Arguments& arguments) {
  P p{};
  const auto& [sizes, wide, activation, query, keys, weight, values, mask, threads] = arguments;
  std::tie(p.B, p.N, p.A, p.D) = sizes;
  p.wide = wide;
  p.activation = Activation(activation);
  p.query = pointer(query);
  p.keys = positions(keys);
  p.weight = pointer(weight);
  p.values = positions(values);
  p.mask = pointer<uint8_t>(std::get<0>(mask));
  p.mask_stride_b = std::get<1>(mask);
  p.mask_stride_n = std::get<2>(mask);
  p.threads = threads;
  return p;
}

}  // namespace

void bind_additive(py::module_& m) {
  m.attr("ADDITIVE_ROWS") = AdditiveBackward::ROWS;

  m.def("additive_forward", [](const Arguments& arguments, uintptr_t softmax, uintptr_t context) {
    auto p = additive<AdditiveForward>(arguments);
    p.softmax = pointer(softmax);
    p.context = pointer(context);
    py::gil_scoped_release release;
    RECATTN_RUN(additive_forward, p);
  });

  // grads: of query, keys, weight and values.
  m.def("additive_backward", [](const Arguments& arguments, uintptr_t softmax, uintptr_t grad_context,
                                uintptr_t grad_weights, uintptr_t scores, uintptr_t sums,
                                std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t> grads) {
    auto p = additive<AdditiveBackward>(arguments);
    p.softmax = pointer(softmax);
    p.grad_context = pointer(grad_context);
    p.grad_weights = pointer(grad_weights);
    p.scores = pointer(scores);
    p.sums = pointer(sums);
    p.grad_query = pointer(std::get<0>(grads));
    p.grad_keys = pointer(std::get<1>(grads));
    p.grad_weight = pointer(std::get<2>(grads));
    p.grad_values = pointer(std::get<3>(grads));
    py::gil_scoped_release release;
    RECATTN_RUN(additive_backward, p);
  });
}

}  // namespace recattn
