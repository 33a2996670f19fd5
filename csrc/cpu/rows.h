// What the recurrences' kernels do with a row (t, b) of a tensor, whatever the cell.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

template <class P>
inline bool resets(const P& p, int64_t t, int64_t b) {
  return p.reset.data && p.reset.data[t * p.reset.stride_t + b * p.reset.stride_b];
}

// to = from, from its element `offset` on.
template <class R>
RECATTN_FN void copy_or_zero(R* to, const void* from, int64_t offset, int64_t n) {
  if (from) {
    memcpy(to, static_cast<const R*>(from) + offset, n * sizeof(R));
  } else {
    memset(to, 0, n * sizeof(R));
  }
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
