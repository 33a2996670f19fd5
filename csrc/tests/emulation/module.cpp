// recattn_kernels._cuda of kernels that are emulated. Built by tests/emulation.py.
#include "cuda/bindings_gated.cpp"
#include "cuda/bindings_indrnn.cpp"

PYBIND11_MODULE(_cuda, m) {
  recattn::bind_indrnn(m);
  recattn::bind_gated(m);
  m.def("last_error", [] { return int(cudaGetLastError()); });
}
