#include "isa.h"

#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace ear_ops::cpu {

namespace {

std::vector<Selection> available() {  // worst first
  std::vector<Selection> found = {{"portable", &kPortable, Bf16Products::kNone}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back({"avx2", &kAvx2, Bf16Products::kNone});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back({"avx512", &kAvx512, Bf16Products::kNone});
    if (at::native::cpublas::could_pack(at::kBFloat16)) found.push_back({"amx", &kAvx512, Bf16Products::kMatrix});
  }
#endif
  return found;
}

Selection choose() {
  const auto found = available();
  const char* wanted = std::getenv("EAR_OPS_CPU_ISA");
  if (!wanted || !*wanted) return found.back();
  if (std::string(wanted) == "amx-emulated") {
    const Isa* isa = found.back().isa;
    return {"amx-emulated", isa, Bf16Products::kEmulated};
  }
  std::string names;
  for (const auto& candidate : found) {
    if (std::string(wanted) == candidate.name) return candidate;
    names += std::string(candidate.name) + ", ";
  }
  TORCH_CHECK_VALUE(false, "EAR_OPS_CPU_ISA: expected one of ", names, "amx-emulated (what this processor has), got '",
                    wanted, "'");
}

}  // namespace

const Selection& selection() {
  static const Selection chosen = choose();
  return chosen;
}

TORCH_LIBRARY_FRAGMENT(ear_ops, m) {
  m.def("cpu_isa() -> str", []() -> std::string { return selection().name; });
}

}  // namespace ear_ops::cpu
