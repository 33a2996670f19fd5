// What becomes of an error of the CUDA runtime.
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

}  // namespace RECATTN_ISA
}  // namespace recattn
