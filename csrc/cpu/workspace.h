// Memory and threads of a kernel.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstdlib>
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

// Where threads meet, again and again. OpenMP's own barrier may spin for milliseconds: where other programs run too, on
// the very core that the thread it waits for has to be given.
class Meeting {
 public:
  void meet(int64_t threads) {
    const int now = met.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived.store(0, std::memory_order_relaxed);
      met.store(now + 1, std::memory_order_release);
      met.notify_all();
      return;
    }
    static const int spins = spins_wanted();
    for (int i = 0; i < spins && met.load(std::memory_order_acquire) == now; ++i) pause();
    met.wait(now, std::memory_order_acquire);
  }

 private:
  // Some 400 us: longer than most steps, shorter than what a scheduler gives. OpenMP's users say that none are wanted by
  // OMP_WAIT_POLICY.
  static int spins_wanted() {
    const char* policy = std::getenv("OMP_WAIT_POLICY");
    return policy && (policy[0] == 'p' || policy[0] == 'P') ? 0 : 10000;
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  alignas(64) std::atomic<int> arrived = 0;
  alignas(64) std::atomic<int> met = 0;  // how often
};

// One of the threads that run a function together.
struct Member {
  int64_t thread, threads;
  Meeting* meeting;

  // Until all have come here as often as this one has.
  void meet() const {
    if (threads > 1) meeting->meet(threads);
  }
};

// Calls f(member) on every thread.
template <class F>
void on_threads(int threads, F f) {
#ifdef _OPENMP
  if (threads > 1) {
    Meeting meeting;
#pragma omp parallel num_threads(threads)
    f(Member{omp_get_thread_num(), omp_get_num_threads(), &meeting});
    return;
  }
#endif
  (void)threads;
  f(Member{0, 1, nullptr});
}

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
