// What the bindings of every op share: how Python hands over a tensor.
#pragma once

#include <pybind11/pybind11.h>

#include <tuple>

#include "kernels.h"

namespace py = pybind11;

namespace recattn {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Strided = std::tuple<uintptr_t, int64_t, int64_t>;
using Typed = std::tuple<uintptr_t, int>;

inline Sequence sequence(const Strided& s) { return {pointer(std::get<0>(s)), std::get<1>(s), std::get<2>(s)}; }
inline Plain plain(const Typed& x) { return {pointer(std::get<0>(x)), Dtype(std::get<1>(x))}; }

void bind_indrnn(py::module_& m);
void bind_gated(py::module_& m);

}  // namespace recattn
