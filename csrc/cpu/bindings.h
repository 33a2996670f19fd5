// What the bindings of every op share. Each bind_ function adds an op's kernels to the module _cpu; they take integers
// (pointers, sizes, strides) that the caller, an op's cpp.py, has checked, and release the GIL while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "isa.h"

namespace recattn {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_additive(pybind11::module_& m);
void bind_glimpse(pybind11::module_& m);
void bind_normalise(pybind11::module_& m);
void bind_recurrent(pybind11::module_& m);
void bind_slot_attention(pybind11::module_& m);

}  // namespace recattn
