// Runs every test of csrc/tests on every instruction set that this machine has. `make test-csrc` builds it with
// AddressSanitizer and UndefinedBehaviorSanitizer, which end it at the first fault.
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
}
int isa::current() { return taken; }
void Isa::take() const { taken = place; }
}  // namespace recattn

using namespace recattn;

int main() {
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
  std::vector<Isa> isas;
  int failed = 0;
  for (const Isa& isa : table) {
    if (!isa.supported) {
      std::printf("%s: skipped: this CPU has not all of %s\n", isa.name, isa.needs);
      continue;
    }
    const int wrong = isa.test_cells();
    std::printf("%s: cells: %d failed checks\n", isa.name, wrong);
    failed += wrong;
    isas.push_back(isa);
  }
  failed += test_indrnn(isas);
  failed += test_gemm(isas);
  failed += test_gated(isas);
  failed += test_additive(isas);
  failed += test_slot_attention(isas);
  failed += test_glimpse(isas);
  return failed != 0;
}
