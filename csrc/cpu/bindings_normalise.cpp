// Layer normalisation without scale and shift.
#include "bindings.h"
#include "normalise.h"

namespace py = pybind11;

namespace recattn {

void bind_normalise(py::module_& m) {
  m.def("normalise", [](std::tuple<int64_t, int64_t> sizes, float eps, uintptr_t x, uintptr_t y, uintptr_t rstd,
                        uintptr_t dy, uintptr_t dx, int threads) {
    Normalise p{};
    std::tie(p.rows, p.width) = sizes;
    p.threads = threads;
    p.eps = eps;
    p.x = pointer<float>(x);
    p.y = pointer<float>(y);
    p.rstd = pointer<float>(rstd);
    p.dy = pointer<float>(dy);
    p.dx = pointer<float>(dx);
    py::gil_scoped_release release;
    RECATTN_RUN(normalise, p);
  });
}

}  // namespace recattn
