// What every test here uses: CHECK, and the instruction sets that main.cpp runs the tests on. A test returns how many
// of its checks failed. All of it is local to the source that includes it: test_cells.cpp is compiled once for each
// instruction set, and the linker must not hand a function compiled for a wide one to the others.
#pragma once

#include <cstdio>
#include <vector>

#include "../cpu/kernels.h"

namespace recattn {

// take() makes it the one that RECATTN_RUN runs.
struct Isa {
  const char* name;
  bool supported;
  const char* needs;
  int (*test_cells)();
  int place;  // in RECATTN_COPIES
  void take() const;
};

int test_indrnn(const std::vector<Isa>& isas);
int test_gemm(const std::vector<Isa>& isas);
int test_gated(const std::vector<Isa>& isas);
int test_additive(const std::vector<Isa>& isas);
int test_slot_attention(const std::vector<Isa>& isas);
int test_slot_update(const std::vector<Isa>& isas);
int test_glimpse(const std::vector<Isa>& isas);
int test_workspace(const std::vector<Isa>& isas);

namespace {

[[maybe_unused]] int failures = 0;

// The rest is printf's: the values that make the condition false. Only the first few failures are printed.
#define CHECK(condition, ...)                                                   \
  do {                                                                          \
    if (!(condition) && ++failures <= 20) {                                     \
      std::printf("%s:%d: %s is false: ", __FILE__, __LINE__, #condition);      \
      std::printf(__VA_ARGS__);                                                 \
      std::puts("");                                                            \
    }                                                                           \
  } while (false)

}  // namespace
}  // namespace recattn
