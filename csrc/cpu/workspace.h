// Memory and threads of a kernel.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>
#include <new>

namespace recattn {
namespace RECATTN_ISA {
namespace {

// Memory for as long as a kernel runs, in pieces that begin on lines of the cache.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory(static_cast<char*>(::operator new(bytes + 64))) {
    next = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64;
  }
  // A piece of another's.
  explicit Workspace(char* lent) : memory(nullptr), next(lent) {}
  Workspace(const Workspace&) = delete;
  ~Workspace() { ::operator delete(memory); }

  template <class R>
  static int64_t bytes(int64_t n) {
    return (n * int64_t(sizeof(R)) + 63) / 64 * 64;
  }
  template <class R>
  R* take(int64_t n) {
    R* taken = reinterpret_cast<R*>(next);
    next += bytes<R>(n);
    return taken;
  }

 private:
  char *memory, *next;
};

// Calls f(thread, threads) on every thread.
template <class F>
void on_threads(int threads, F f) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    f(int64_t(omp_get_thread_num()), int64_t(omp_get_num_threads()));
    return;
  }
#endif
  (void)threads;
  f(int64_t(0), int64_t(1));
}

[[maybe_unused]] inline void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
