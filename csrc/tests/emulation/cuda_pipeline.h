// Of CUDA's header of this name what csrc/cuda/stream.cuh uses. At random a copy is made at once, or only when the
// thread waits for its group: the ring that it goes to has to be right for both.
#pragma once

#include <cuda_runtime_api.h>

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  const bool sized = bytes == 4 || bytes == 8 || bytes == 16, aligned = (uintptr_t(to) | uintptr_t(from)) % bytes == 0;
  if (!sized || !aligned) emulation::broken = "a copy that the hardware does not make";
  auto& groups = emulation::current->copies;
  if (groups.empty()) groups.emplace_back();
  if (emulation::random() % 2) {
    memcpy(to, from, bytes);
  } else {
    groups.back().push_back({to, from, bytes});
  }
}

inline void __pipeline_commit() {
  auto& groups = emulation::current->copies;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

// All groups but the last `count` that were committed.
inline void __pipeline_wait_prior(size_t count) {
  auto& groups = emulation::current->copies;
  for (; groups.size() > count + 1; groups.pop_front()) {
    for (const emulation::Copy& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
  }
}
