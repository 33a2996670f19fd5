// recattn_kernels._cpu: the CPU kernels, and which instruction set they run with.
#include "bindings.h"

#include <stdexcept>
#include <string>

#include "machine.h"

namespace py = pybind11;

namespace recattn::isa {
namespace {

struct Isa {
  const char* name;
  bool supported;
};

// In the order of RECATTN_COPIES: the widest last.
const Isa table[] = {
#ifdef __x86_64__
    {"x86-64", true},
    {"avx2", has_v3()},
    {"avx512", has_v4()},
#ifdef RECATTN_HAS_AMX
    {"amx", has_v4() && has_amx()},
#endif
#else
    {"generic", true},
#endif
};

int widest() {
  int chosen = 0;
  for (int i = 0; i < int(std::size(table)); ++i)
    if (table[i].supported) chosen = i;
  return chosen;
}

int chosen = widest();

void set_capability(const std::string& name) {
  for (int i = 0; i < int(std::size(table)); ++i) {
    if (table[i].name == name && table[i].supported) {
      chosen = i;
      return;
    }
  }
  throw std::invalid_argument("capability '" + name + "' is unknown or not of this machine");
}

py::tuple capabilities() {
  py::list names;
  for (const Isa& isa : table)
    if (isa.supported) names.append(isa.name);
  return py::tuple(names);
}

}  // namespace

int current() { return chosen; }

}  // namespace recattn::isa

PYBIND11_MODULE(_cpu, m) {
  using namespace recattn;
  m.def("capability", [] { return isa::table[isa::current()].name; });
  m.def("capabilities", &isa::capabilities);
  m.def("set_capability", &isa::set_capability);
  m.def("advise_huge_pages", &advise_huge_pages);
  bind_normalise(m);
  bind_recurrent(m);
  bind_slot_attention(m);
  bind_glimpse(m);
  bind_additive(m);
}
