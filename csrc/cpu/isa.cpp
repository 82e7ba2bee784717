#include "isa.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

namespace ear_ops::cpu {

namespace {

// Whether oneDNN multiplies bfloat16 here: it may be switched off, or held to older instruction sets.
bool brgemm_takes_bf16() {
  std::vector<at::BFloat16> operand(kLanes * kLanes);
  std::vector<float> product(kLanes * kLanes);
  try {
    at::native::cpublas::brgemm(kLanes, kLanes, kLanes, kLanes, kLanes, kLanes, false, operand.data(), operand.data(),
                                product.data(), true);
    at::native::cpublas::brgemm_release(true);
  } catch (const std::exception&) {
    return false;
  }
  return true;
}

std::vector<Selection> available() {  // worst first
  std::vector<Selection> found = {{"portable", &kPortable, Bf16Products::kNone, false}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back({"avx2", &kAvx2, Bf16Products::kNone, false});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back({"avx512", &kAvx512, Bf16Products::kNone, false});
    if (__builtin_cpu_supports("avx512bf16") && brgemm_takes_bf16())
      found.push_back({"avx512_bf16", &kAvx512, Bf16Products::kDot, false});
    if (at::native::cpublas::could_pack(at::kBFloat16))
      found.push_back({"amx", &kAvx512, Bf16Products::kMatrix, false});
  }
#endif
  return found;
}

Selection choose() {
  const auto found = available();
  const char* wanted = std::getenv("EAR_OPS_CPU_ISA");
  if (!wanted || !*wanted) return found.back();
  auto choices = found;
  choices.push_back({"avx512_bf16-emulated", found.back().isa, Bf16Products::kDot, true});
  choices.push_back({"amx-emulated", found.back().isa, Bf16Products::kMatrix, true});
  std::string names;
  for (const auto& candidate : choices) {
    if (std::string(wanted) == candidate.name) return candidate;
    names += (names.empty() ? "" : ", ") + std::string(candidate.name);
  }
  TORCH_CHECK_VALUE(false, "EAR_OPS_CPU_ISA: expected one of ", names, " (what this processor has), got '", wanted,
                    "'");
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
