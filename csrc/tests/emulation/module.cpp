// What recattn_kernels._cuda has of the kernels that can be emulated. Built and used by tests/test_gated_cuda.py.
#include "cuda/bindings_gated.cpp"

PYBIND11_MODULE(_cuda, m) {
  recattn::bind_gated(m);
  m.def("last_error", [] { return int(cudaGetLastError()); });
}
