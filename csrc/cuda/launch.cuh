// How a kernel is launched, and what becomes of an error of the CUDA runtime.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace recattn {
namespace RECATTN_ISA {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgotten, or the next launch of this thread would be told of it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// kernel<<<grid, block, shared, stream>>>(arguments...)
template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const char* what,
            P... arguments) {
  void* pointers[] = {&arguments...};
  check(cudaLaunchKernel(kernel, grid, block, pointers, shared, stream), what);
}

}  // namespace RECATTN_ISA
}  // namespace recattn
