// The kernels' dtypes, and which of a kernel's copies runs: each kernel source is compiled once per instruction set, into
// a namespace of that name.
#pragma once

#include <cstdint>

namespace recattn {

enum class Dtype : int { float32, float64, bfloat16, float16 };

namespace isa {
// The chosen instruction set, as its place in the tables of RECATTN_RUN: the widest that the machine has, until
// set_capability() of Python takes another.
int current();

// That of x86-64-v4 whose kernels multiply with the units of amx.h too.
constexpr int AMX = 3;
#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define RECATTN_HAS_AMX
#endif
#endif
}  // namespace isa

// RECATTN_DECLARE(name, P): void name(const P&), in each namespace. RECATTN_RUN(name, p): the chosen copy of it.
#ifdef __x86_64__
#define RECATTN_DECLARE(name, P)          \
  namespace isa_base { void name(const P&); } \
  namespace isa_v3 { void name(const P&); }   \
  namespace isa_v4 { void name(const P&); }
#define RECATTN_COPIES(name) {isa_base::name, isa_v3::name, isa_v4::name, isa_v4::name}
#else
#define RECATTN_DECLARE(name, P) \
  namespace isa_base { void name(const P&); }
#define RECATTN_COPIES(name) {isa_base::name}
#endif
#define RECATTN_RUN(name, ...)                                                 \
  do {                                                                         \
    static constexpr decltype(&isa_base::name) copies[] = RECATTN_COPIES(name); \
    copies[isa::current()](__VA_ARGS__);                                       \
  } while (false)

}  // namespace recattn
