// recattn_kernels._cuda: the CUDA kernels as functions of integers (pointers, sizes, strides, the stream). The caller, an
// op's cuda.py, has checked every argument and made the tensors' device current; nothing is checked again here.
#include "bindings.h"

PYBIND11_MODULE(_cuda, m) {
  recattn::bind_indrnn(m);
  recattn::bind_gated(m);
}
