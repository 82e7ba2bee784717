// ear_ops._build_info says what this installation was built with. It depends on no torch, so that it can be asked
// before a binary that does is loaded. It is compiled last: setup.py writes build_facts.h once it knows what was built.
// Where pybind11 is missing, setup.py writes a Python file with the same function in its place.
#include <pybind11/pybind11.h>

#include "build_facts.h"

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Facts recorded when the package was built.";
  m.def("facts", [] { return pybind11::module_::import("json").attr("loads")(EAR_OPS_FACTS); });
}
