// ear_ops._build_info: what this installation was built with. Depends on no torch, so that it can be asked before a
// binary that does is loaded.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Facts recorded when the extension was built.";
  m.def("facts", []() {
    py::dict facts;
    facts["version"] = EAR_OPS_VERSION;
    facts["torch"] = EAR_OPS_TORCH_VERSION;
    facts["compiler"] = __VERSION__;
    facts["kernels"] = EAR_OPS_KERNELS;                        // "cpu" or "cpu cuda"
    facts["cpu_isas"] = EAR_OPS_CPU_ISAS;                      // the builds that the CPU binary holds
    facts["cuda_architectures"] = EAR_OPS_CUDA_ARCHITECTURES;  // "sm_80 sm_90", empty without CUDA kernels
    return facts;
  });
}
