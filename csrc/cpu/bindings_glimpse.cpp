// Glimpses of images.
#include "bindings.h"
#include "glimpse.h"

namespace py = pybind11;

namespace recattn {
namespace {

using Four = std::tuple<int64_t, int64_t, int64_t, int64_t>;

// What both directions take, in one tuple: B C H W, G S height width, mode, padding, factor, base, pixel, dtype, whether
// loc is double; image and its strides, loc and its strides, zoom and its strides; threads.
using Arguments = std::tuple<Four, Four, int, int, double, double, int, int, bool, uintptr_t, Four,
                             std::tuple<uintptr_t, int64_t, int64_t, int64_t>, std::tuple<uintptr_t, int64_t, int64_t>,
                             int>;

template <class P>
P arguments(const Arguments& from) {
  P p{};
  const auto& [sizes, cells, mode, padding, factor, base, pixel, dtype, wide, image, strides, loc, zoom, threads] = from;
  std::tie(p.B, p.C, p.H, p.W) = sizes;
  std::tie(p.G, p.S, p.height, p.width) = cells;
  p.mode = GlimpseMode(mode);
  p.padding = Padding(padding);
  p.factor = factor;
  p.base = base;
  p.pixel = Pixel(pixel);
  p.dtype = Dtype(dtype);
  p.wide = wide;
  p.image = pointer(image);
  std::tie(p.image_b, p.image_c, p.image_y, p.image_x) = strides;
  uintptr_t loc_address, zoom_address;
  std::tie(loc_address, p.loc_b, p.loc_g, p.loc_xy) = loc;
  std::tie(zoom_address, p.zoom_b, p.zoom_g) = zoom;
  p.loc = pointer(loc_address);
  p.zoom = pointer(zoom_address);
  p.threads = threads;
  return p;
}

}  // namespace

void bind_glimpse(py::module_& m) {
  m.def("glimpse_forward", [](const Arguments& from, uintptr_t out) {
    auto p = arguments<GlimpseForward>(from);
    p.out = pointer(out);
    py::gil_scoped_release release;
    RECATTN_RUN(glimpse_forward, p);
  });

  m.def("glimpse_backward", [](const Arguments& from, uintptr_t grad_out, uintptr_t grad_image, uintptr_t grad_loc,
                               uintptr_t grad_zoom, uintptr_t parts) {
    auto p = arguments<GlimpseBackward>(from);
    p.grad_out = pointer(grad_out);
    p.grad_image = pointer(grad_image);
    p.grad_loc = pointer(grad_loc);
    p.grad_zoom = pointer(grad_zoom);
    p.parts = pointer<double>(parts);
    py::gil_scoped_release release;
    RECATTN_RUN(glimpse_backward, p);
  });
}

}  // namespace recattn
