// Memory asked for while something else is computed.
#pragma once

#include "vector.h"

namespace recattn {
namespace RECATTN_ISA {
namespace {

// Asks for memory that is to be read, or written, soon; LEVEL as __builtin_prefetch has it, 3 for the first-level cache.
// Beyond the end of memory it does nothing.
template <int WRITE = 0, int LEVEL = 2>
RECATTN_FN void fetch(const void* from, int64_t bytes) {
  asm volatile("");  // GCC takes a function that only asks for one without effect, and drops its calls
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, WRITE, LEVEL);
}

// Asks for memory before its use, line by line, from within the loops of the products. Asked for in one go, the lines
// would wait for each other and the products for them; read only when they are needed, 16 rows at a time, they come in
// an order in which the hardware does not see what is next.
class Ahead {
 public:
  uintptr_t line = 0, end = 0;  // the next to ask for, and where what lies in one piece with it ends
  int64_t step = 0;

  void clear() { line = end = 0, step = 0, count = number = 0; }

  // `rows` rows of `width` bytes, `stride` apart. What finds no place any more is left to the hardware.
  void add(uintptr_t from, int64_t stride, int64_t width, int64_t rows) {
    if (count == MOST || width == 0) return;
    if (stride == width) width *= rows, rows = 1;
    areas[count++] = {from, stride, width, rows};
    if (count == 1) line = start();
  }

  // Asks for one line.
  RECATTN_FN void ask() {
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
    line += step;
    if (__builtin_expect(line >= end, 0)) line = next(line);
  }

  // The line that follows `now`, when that has come to the end.
  __attribute__((noinline)) uintptr_t next(uintptr_t now) {
    if (number < count && --areas[number].rows > 0) {
      areas[number].row += areas[number].stride;
    } else if (number < count) {
      ++number;
    }
    if (number < count) return start();
    step = 0, end = UINTPTR_MAX;  // the last one again and again, or a line at hand, which costs nothing
    return count > 0 ? now - 1 : reinterpret_cast<uintptr_t>(this);
  }

 private:
  static constexpr int MOST = 16;
  struct Area {
    uintptr_t row;
    int64_t stride, width, rows;
  };

  uintptr_t start() {
    step = 64, end = areas[number].row + areas[number].width;
    return areas[number].row;
  }

  Area areas[MOST];
  int count = 0, number = 0;
};

// Asks for nothing.
struct NothingAhead {
  RECATTN_FN void ask() {}
};

}  // namespace
}  // namespace RECATTN_ISA
}  // namespace recattn
