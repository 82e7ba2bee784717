// Registers the CPU kernels for the operators whose schemas ear_ops/_library.py defines.
#include <torch/library.h>

#include "../ops.h"
#include "isa.h"

TORCH_LIBRARY_FRAGMENT(ear_ops, m) {
  m.def("cpu_isa() -> str", []() -> std::string { return ear_ops::cpu::selection().name; });
  m.def("cpu_rates(int m, int n, int k, ScalarType dtype) -> float[]", &ear_ops::cpu_rates);
}

TORCH_LIBRARY_IMPL(ear_ops, CPU, m) {
  m.impl("qk_attention_mse", &ear_ops::qk_attention_mse);
  m.impl("qk_attention_mse_backward", &ear_ops::qk_attention_mse_backward);
  m.impl("attention_mse", &ear_ops::attention_mse);
  m.impl("attention_mse_backward", &ear_ops::attention_mse_backward);
  m.impl("pooled_distance", &ear_ops::pooled_distance);
  m.impl("pooled_distance_backward", &ear_ops::pooled_distance_backward);
}
