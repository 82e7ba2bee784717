// ear_ops._build_info says what this installation was built with. It depends on no torch, so that it can be asked
// before a binary that does is loaded. It is compiled last: setup.py writes build_facts.h once it knows what was built.
#include <pybind11/pybind11.h>

#include <utility>

#include "build_facts.h"

namespace py = pybind11;

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Facts recorded when the extension was built.";
  m.def("facts", []() {
    py::dict not_built;  // {"cuda": "nvcc failed on ..."}: the kernels left out, and why
    for (auto [kind, reason] : {std::pair{"cpu", EAR_OPS_CPU_NOT_BUILT}, std::pair{"cuda", EAR_OPS_CUDA_NOT_BUILT}}) {
      if (*reason != '\0') not_built[kind] = reason;
    }
    py::dict facts;
    facts["version"] = EAR_OPS_VERSION;
    facts["torch"] = EAR_OPS_TORCH_VERSION;
    facts["compiler"] = __VERSION__;
    facts["kernels"] = EAR_OPS_KERNELS;                        // "cpu", "cuda", "cpu cuda" or empty
    facts["cpu_isas"] = EAR_OPS_CPU_ISAS;                      // the builds that the CPU binary holds, empty without it
    facts["cuda_architectures"] = EAR_OPS_CUDA_ARCHITECTURES;  // "sm_80 sm_90a", empty without CUDA kernels
    facts["not_built"] = not_built;
    return facts;
  });
}
