// What this machine has of that which the kernels' copies are compiled for, and how its memory is asked for.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace recattn {

#ifdef __x86_64__
// All that -march=x86-64-v3 lets a compiler use. Of F16C, MOVBE and LZCNT not every compiler that takes that option has
// a name in __builtin_cpu_supports; the others' includes that the system saves the wide registers.
inline bool has_v3() {
  unsigned a, b, c, d, extended;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !__get_cpuid(0x80000001, &a, &b, &extended, &d)) return false;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && (c & bit_F16C) && (c & bit_MOVBE) && (extended & bit_LZCNT);
}

inline bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// The units of amx.h, which Linux gives to a process that asks for them.
inline bool has_amx() {
#ifdef __linux__
  constexpr int REQUEST_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA, linux/prctl.h
  constexpr unsigned AVX512_BF16 = 1u << 5, AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (AMX_BF16 | AMX_TILE)) != (AMX_BF16 | AMX_TILE)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & AVX512_BF16)) return false;
  return syscall(SYS_arch_prctl, REQUEST_STATE, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

// Has the system give pages of 2 MB to what lies within, where nothing has been written yet. It may decline.
inline void advise_huge_pages(uintptr_t begin, uintptr_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t PAGE = uintptr_t(1) << 21;
  const uintptr_t from = (begin + PAGE - 1) / PAGE * PAGE, to = (begin + bytes) / PAGE * PAGE;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace recattn
