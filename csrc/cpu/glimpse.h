// What the kernels of glimpse take: bindings_glimpse.cpp fills these structs from Python. Strides are in elements.
#pragma once

#include "isa.h"

namespace recattn {

enum class GlimpseMode : int { area, bilinear, kevinzakka, tf, dpnn };
enum class Padding : int { zeros, border, reflect };
enum class Pixel : int { float32, float64, bfloat16, float16, uint8 };  // Dtype, and uint8

// R is double where loc is, else float.
struct Glimpse {
  int64_t B, C, H, W, G, S, height, width;
  GlimpseMode mode;
  Padding padding;
  double factor, base;  // cells of scale s have base * zoom * factor^s pixels
  Pixel pixel;
  Dtype dtype;  // of the cells
  bool wide;    // loc is double
  const void* image;
  int64_t image_b, image_c, image_y, image_x;
  const void* loc;  // (B, G, 2): x, y
  int64_t loc_b, loc_g, loc_xy;
  const void* zoom;  // (B, G) or null
  int64_t zoom_b, zoom_g;
  int threads;
};

struct GlimpseForward : Glimpse {
  void* out;  // (B, G, S, C, height, width)
};

struct GlimpseBackward : Glimpse {
  const void* grad_out;
  void* grad_image;  // (B, C, H, W) in the image's type, contiguous, or null
  void* grad_loc;    // (B, G, 2) in R, or null: then grad_zoom is too
  void* grad_zoom;   // (B, G) in R, or null
  double* parts;     // (B, G, S, 3) scratch: each scale's dx, dy and dk
};

RECATTN_DECLARE(glimpse_forward, GlimpseForward)
RECATTN_DECLARE(glimpse_backward, GlimpseBackward)

}  // namespace recattn
