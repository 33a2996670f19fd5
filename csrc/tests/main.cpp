// Runs the tests of csrc/tests that are named, or all, on every instruction set that this machine has. `make test-csrc`
// builds it with AddressSanitizer and UndefinedBehaviorSanitizer, which end it at the first fault.
#include <algorithm>
#include <cstring>

#include "../cpu/machine.h"
#include "check.h"

namespace recattn {
namespace isa_base { int test_cells(); }
#ifdef __x86_64__
namespace isa_v3 { int test_cells(); }
namespace isa_v4 { int test_cells(); }
#endif

namespace {
int taken = 0;

// At once, each set's being a program of its own: together they take as long as all other tests.
int test_cells(const std::vector<Isa>& isas) {
  int failed = 0;
#pragma omp parallel for num_threads(int(isas.size())) schedule(static, 1) reduction(+ : failed)
  for (size_t i = 0; i < isas.size(); ++i) {
    const Isa& set = isas[i];
    if (set.place == isa::AMX) continue;  // its cells are those of isa_v4: only products take AMX
    const int wrong = set.test_cells();
    std::printf("%s: cells: %d failed checks\n", set.name, wrong);
    failed += wrong;
  }
  return failed;
}
}  // namespace

int isa::current() { return taken; }
void Isa::take() const { taken = place; }
}  // namespace recattn

using namespace recattn;

int main(int count, char** names) {
  const Isa table[] = {
      {"isa_base", true, "", isa_base::test_cells, 0},
#ifdef __x86_64__
      {"isa_v3", has_v3(), "AVX2, FMA, BMI1, BMI2, F16C, MOVBE and LZCNT", isa_v3::test_cells, 1},
      {"isa_v4", has_v4(), "x86-64-v3 and AVX-512 F, BW, CD, DQ and VL", isa_v4::test_cells, 2},
#ifdef RECATTN_HAS_AMX
      {"isa_v4 with AMX", has_v4() && has_amx(), "x86-64-v4 and AMX of bfloat16", isa_v4::test_cells, isa::AMX},
#endif
#endif
  };
  const struct {
    const char* name;
    int (*run)(const std::vector<Isa>& isas);
  } tests[] = {{"cells", test_cells}, {"indrnn", test_indrnn}, {"gemm", test_gemm}, {"gated", test_gated},
               {"additive", test_additive}, {"slot_attention", test_slot_attention}, {"slot_update", test_slot_update},
               {"glimpse", test_glimpse}, {"workspace", test_workspace}};
  std::vector<Isa> isas;
  for (const Isa& isa : table) {
    if (isa.supported) {
      isas.push_back(isa);
    } else {
      std::printf("%s: skipped: this CPU has not all of %s\n", isa.name, isa.needs);
    }
  }
  int known = 0, failed = 0;
  for (const auto& test : tests) {
    const auto is_it = [&](const char* name) { return std::strcmp(name, test.name) == 0; };
    const int asked = int(std::count_if(names + 1, names + count, is_it));
    known += asked;
    if (asked || count == 1) failed += test.run(isas);
  }
  if (known != count - 1) std::printf("there is no test of one of these names\n");
  return failed != 0 || known != count - 1;
}
