// csrc/cpu/glimpse_*.cpp: the gradient of the image is the transpose of the forward, <out, d> = <image, grad_image>,
// and no window, wherever it is and however large, reads or writes outside: every array is of its exact size.
#include <cmath>
#include <random>

#include "../cpu/glimpse.h"
#include "check.h"

namespace recattn {
namespace {

struct Shape {
  int64_t B, C, H, W, G, S, height, width;
};

void check_glimpse(const Isa& isa, const Shape& n, GlimpseMode mode, Padding padding, bool interleaved, double base,
                   float reach, std::mt19937_64& random) {
  std::uniform_real_distribution<float> uniform(-1, 1);
  auto drawn = [&](int64_t size, float scale) {
    std::vector<float> values(size);
    for (float& v : values) v = scale * uniform(random);
    return values;
  };
  const std::vector<float> image = drawn(n.B * n.C * n.H * n.W, 1), loc = drawn(n.B * n.G * 2, reach);
  const int64_t cells = n.B * n.G * n.S * n.C * n.height * n.width;
  const std::vector<float> d = drawn(cells, 1);
  std::vector<float> out(cells, NAN), grad_image(image.size(), NAN), grad_loc(loc.size(), NAN);
  std::vector<double> parts(n.B * n.G * n.S * 3, NAN);
  Glimpse p{};
  p.B = n.B, p.C = n.C, p.H = n.H, p.W = n.W, p.G = n.G, p.S = n.S, p.height = n.height, p.width = n.width;
  p.mode = mode, p.padding = padding, p.factor = 2, p.base = base, p.dtype = Dtype::float32, p.pixel = Pixel::float32;
  p.image = image.data(), p.image_b = n.C * n.H * n.W;
  p.image_c = interleaved ? 1 : n.H * n.W;
  p.image_y = interleaved ? n.W * n.C : n.W;
  p.image_x = interleaved ? n.C : 1;
  p.loc = loc.data(), p.loc_b = n.G * 2, p.loc_g = 2, p.loc_xy = 1, p.threads = 2;
  GlimpseForward forward{};
  static_cast<Glimpse&>(forward) = p;
  forward.out = out.data();
  isa.glimpse_forward(forward);
  GlimpseBackward backward{};
  static_cast<Glimpse&>(backward) = p;
  backward.grad_out = d.data(), backward.grad_image = grad_image.data();
  if (mode == GlimpseMode::area || mode == GlimpseMode::bilinear) {
    backward.grad_loc = grad_loc.data(), backward.parts = parts.data();
  }
  isa.glimpse_backward(backward);
  double one = 0, other = 0, size = 1;
  for (int64_t i = 0; i < cells; ++i) one += double(out[i]) * d[i], size += std::fabs(double(out[i]) * d[i]);
  for (int64_t b = 0; b < n.B; ++b) {
    for (int64_t c = 0; c < n.C; ++c) {
      for (int64_t y = 0; y < n.H; ++y) {
        for (int64_t x = 0; x < n.W; ++x) {
          const float pixel = image[b * p.image_b + c * p.image_c + y * p.image_y + x * p.image_x];
          other += double(pixel) * grad_image[((b * n.C + c) * n.H + y) * n.W + x];
        }
      }
    }
  }
  CHECK(std::fabs(one - other) <= 1e-5 * size, "%s: mode %d, padding %d, %g and %g", isa.name, int(mode),
        int(padding), one, other);
}

}  // namespace

int test_glimpse(const std::vector<Isa>& isas) {
  const Shape shapes[] = {{1, 1, 1, 1, 1, 1, 1, 1}, {2, 3, 17, 9, 2, 3, 5, 4}, {1, 2, 40, 70, 3, 2, 18, 33}};
  int cases = 0;
  for (const Isa& isa : isas) {
    std::mt19937_64 random(0);
    for (const Shape& shape : shapes) {
      for (int mode = 0; mode < 5; ++mode) {
        for (int padding = 0; padding < (mode < 2 ? 3 : 1); ++padding) {
          for (const float reach : {1.0f, 3.0f, 1e4f, 3e38f}) {
            for (const double base : {1.0, 0.01, 7.3}) {
              if (mode > 1 && base != 1) continue;
              for (const bool interleaved : {false, true}) {
                const auto smooth = GlimpseMode(mode);
                check_glimpse(isa, shape, smooth, Padding(padding), interleaved, base, reach, random);
                ++cases;
              }
            }
          }
        }
      }
    }
  }
  std::printf("glimpse: %d cases: %d failed checks\n", cases, failures);
  return failures;
}

}  // namespace recattn
