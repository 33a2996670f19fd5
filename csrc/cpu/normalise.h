// Layer normalisation without scale and shift, in float32.
#pragma once

#include "isa.h"

namespace recattn {

struct Normalise {
  int64_t rows, width;
  int threads;
  float eps;
  const float* x;   // (rows, width), as are all but the rstd (rows,)
  float* y;
  float* rstd;
  const float* dy;  // null: forward, from x to y and rstd
  float* dx;        // backward, from y, rstd and dy
};

RECATTN_DECLARE(normalise, Normalise)

}  // namespace recattn
