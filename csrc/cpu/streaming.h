// Stores that go past the caches to memory.
#pragma once

#include "vector.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

// A result of at least this many bytes: to store it, caches would first read what it overwrites, and evict
// what is read next.
constexpr int64_t STREAM_FROM = int64_t(8) << 20;

// Whether rows of `bytes` each may be streamed: only whole lines of the cache can, and a row must not share its last one.
[[maybe_unused]] inline bool whole_lines(const void* data, int64_t bytes) {
  return (reinterpret_cast<uintptr_t>(data) | bytes) % 64 == 0;
}

// Whether that many rows of `bytes` each, one after the other, go past the caches.
[[maybe_unused]] inline bool streams(const void* to, int64_t rows, int64_t bytes) {
  return rows * bytes >= STREAM_FROM && whole_lines(to, bytes);
}

// Copies n elements, whole lines of an aligned buffer; end_streaming() orders them before what is stored next.
template <class S>
void stream_row(S* to, const S* from, int64_t n) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < n; i += 64 / sizeof(S)) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_load_si512(from + i));
  }
#elif defined(__SSE2__)
  for (int64_t i = 0; i < n; i += 16 / sizeof(S)) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_load_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#else
  memcpy(static_cast<void*>(to), from, n * sizeof(S));
#endif
}

// Stores n results, of which there are at most MOST, in their type. To be streamed, `from` is aligned.
template <int64_t MOST, class S, class R>
RECATTN_FN void write(S* __restrict to, const R* __restrict from, int64_t n, bool stream) {
  if constexpr (sizeof(S) == 2) {
    alignas(64) S line[MOST];
    narrow(stream ? line : to, from, n);
    if (stream) stream_row(to, line, n);
  } else if (stream) {
    stream_row(to, from, n);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}

[[maybe_unused]] inline void end_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
