// Picks the instance of the qk_attention_mse kernels: the narrowest chunk that holds the head dimension, or the widest
// one that the device's shared memory holds.
#include "primitives.cuh"
#include "qk_kernels.h"

namespace ear_ops::cuda {

namespace {

template <typename T, int kD, int... kNarrower>
const char* run_widest(bool backward, const QKArgs& a, void* stream, int64_t limit) {
  using Kernels = QKKernels<T, kD>;
  if constexpr (sizeof...(kNarrower) > 0)
    if (Kernels::shared_bytes(a) > limit) return run_widest<T, kNarrower...>(backward, a, stream, limit);
  return backward ? Kernels::backward(a, stream) : Kernels::forward(a, stream);
}

template <typename T>
const char* run_as(bool backward, const QKArgs& a, void* stream) {
  const int64_t limit = shared_memory_limit();
  if (a.dim <= 32) return run_widest<T, 32>(backward, a, stream, limit);
  if (a.dim <= 64) return run_widest<T, 64, 32>(backward, a, stream, limit);
  if (a.dim <= 96) return run_widest<T, 96, 64, 32>(backward, a, stream, limit);
  return run_widest<T, 128, 64, 32>(backward, a, stream, limit);
}

const char* run(Element element, bool backward, const QKArgs& a, void* stream) {
  switch (element) {
    case Element::kFloat32:
      return run_as<float>(backward, a, stream);
    case Element::kBFloat16:
      return run_as<bfloat16>(backward, a, stream);
    default:
      return run_as<float16>(backward, a, stream);
  }
}

}  // namespace

const char* launch_qk_forward(Element element, const QKArgs& args, void* stream) {
  return run(element, false, args, stream);
}

const char* launch_qk_backward(Element element, const QKArgs& args, void* stream) {
  return run(element, true, args, stream);
}

}  // namespace ear_ops::cuda
