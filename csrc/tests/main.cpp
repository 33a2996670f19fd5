// Runs every test of csrc/tests on every instruction set that this machine has. `make test-csrc` builds it with
// AddressSanitizer and UndefinedBehaviorSanitizer, which end it at the first fault.
#include "check.h"

namespace recattn {
#define RECATTN_DECLARE(isa) \
  namespace isa {            \
  int test_cells();          \
  }
RECATTN_DECLARE(isa_base)
#ifdef __x86_64__
RECATTN_DECLARE(isa_v3)
RECATTN_DECLARE(isa_v4)
#endif
#undef RECATTN_DECLARE
}  // namespace recattn

using namespace recattn;

int main() {
  // The conditions are those of csrc/cpu/bindings.cpp.
#define RECATTN_ISA_ROW(ns, supported, needs)                                                                          \
  {#ns,      bool(supported), needs,          ns::test_cells, ns::indrnn_forward, ns::indrnn_backward, \
   ns::gemm, ns::column_sum,  ns::gated_forward, ns::gated_backward, \
   ns::glimpse_forward, ns::glimpse_backward}
  const Isa table[] = {
      RECATTN_ISA_ROW(isa_base, true, ""),
#ifdef __x86_64__
      RECATTN_ISA_ROW(isa_v3,
                      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"),
                      "AVX2, FMA and BMI2"),
      RECATTN_ISA_ROW(isa_v4,
                      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl"),
                      "AVX-512 F, BW, CD, DQ and VL"),
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
  failed += test_glimpse(isas);
  return failed != 0;
}
