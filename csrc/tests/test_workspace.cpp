// csrc/cpu/workspace.h: the threads that run a function together, and where they meet.
#include "../cpu/workspace.h"

#include <chrono>
#include <thread>

#include "check.h"

namespace recattn {
using namespace RECATTN_ISA;

namespace {

// Each writes a number, and after they have met sees those of the others; who comes late is awaited.
void check_meetings(int threads) {
  constexpr int ROUNDS = 2000;
  std::vector<int> numbers(threads, -1), wrong(threads), came(threads);
  on_threads(threads, [&](const Member& member) {
    for (int round = 0; round < ROUNDS; ++round) {
      if (round % 200 == 17 * member.thread) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      numbers[member.thread] = round;
      member.meet();
      for (int i = 0; i < member.threads; ++i) wrong[member.thread] += numbers[i] != round;
      member.meet();
    }
    came[member.thread] = 1;
  });
  for (int i = 0; i < threads && came[i]; ++i) CHECK(wrong[i] == 0, "thread %d of %d: %d", i, threads, wrong[i]);
  CHECK(came[0] == 1, "%d threads", threads);
}

}  // namespace

int test_workspace(const std::vector<Isa>&) {
  for (int threads : {1, 2, 3, 8}) check_meetings(threads);
  std::printf("workspace: %d failed checks\n", failures);
  return failures;
}

}  // namespace recattn
