// The widest vectors of an instruction set.
#pragma once

#include "numeric.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class R> struct Vector {
  typedef R type __attribute__((vector_size(VECTOR_BYTES)));
};
template <class R> using Vec = typename Vector<R>::type;
template <class R> constexpr int LANES = VECTOR_BYTES / sizeof(R);

// At any address.
template <class R>
RECATTN_FN Vec<R> load_vector(const R* from) {
  Vec<R> v;
  memcpy(&v, from, VECTOR_BYTES);
  return v;
}
template <class R>
RECATTN_FN void store_vector(R* to, const Vec<R>& v) {
  memcpy(to, &v, VECTOR_BYTES);
}

[[maybe_unused]] inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
[[maybe_unused]] inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
