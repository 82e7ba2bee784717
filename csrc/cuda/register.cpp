// Registers the CUDA kernels for the operators whose schemas ear_ops/_library.py defines.
#include <torch/library.h>

#include "../ops.h"

#if !defined(EAR_OPS_LIBRARY)  // tests register the same kernels, compiled for the host, elsewhere
#define EAR_OPS_LIBRARY ear_ops
#define EAR_OPS_DISPATCH_KEY CUDA
#endif

TORCH_LIBRARY_IMPL(EAR_OPS_LIBRARY, EAR_OPS_DISPATCH_KEY, m) {
  m.impl("qk_attention_mse", &ear_ops::qk_attention_mse);
  m.impl("qk_attention_mse_backward", &ear_ops::qk_attention_mse_backward);
  m.impl("attention_mse", &ear_ops::attention_mse);
  m.impl("attention_mse_backward", &ear_ops::attention_mse_backward);
  m.impl("pooled_distance", &ear_ops::pooled_distance);
  m.impl("pooled_distance_backward", &ear_ops::pooled_distance_backward);
}
