// Picks the instance of the kernels of a comparison: the narrowest chunk that holds the head dimension, or the widest
// one that the device's shared memory holds.
#include <type_traits>

#include "primitives.cuh"
#include "qk_hopper.h"
#include "qk_kernels.h"

namespace ear_ops::cuda {

namespace {

// Calls use(kernels) with the widest of the instances that the device holds.
template <Comparison kComparison, typename T, int kD, int... kNarrower, typename Use>
auto with_widest(const QKArgs& a, int64_t limit, const Use& use) {
  using Kernels = QKKernels<kComparison, T, kD>;
  if constexpr (sizeof...(kNarrower) > 0)
    if (Kernels::shared_bytes(a) > limit) return with_widest<kComparison, T, kNarrower...>(a, limit, use);
  return use(Kernels{});
}

template <Comparison kComparison, typename T, typename Use>
auto with_kernels_of(const QKArgs& a, const Use& use) {
  const int64_t limit = shared_memory_limit();
  if (a.dim <= 32) return with_widest<kComparison, T, 32>(a, limit, use);
  if (a.dim <= 64) return with_widest<kComparison, T, 64, 32>(a, limit, use);
  if (a.dim <= 96) return with_widest<kComparison, T, 96, 64, 32>(a, limit, use);
  // Registers do not hold the gradients of 128 features beside squared scores of floats.
  if constexpr (kComparison == Comparison::kScores && std::is_same<T, float>::value)
    return with_widest<kComparison, T, 64, 32>(a, limit, use);
  else
    return with_widest<kComparison, T, 128, 64, 32>(a, limit, use);
}

template <Comparison kComparison, typename Use>
auto with_element(Element element, const QKArgs& a, const Use& use) {
  switch (element) {
    case Element::kFloat32:
      return with_kernels_of<kComparison, float>(a, use);
    case Element::kBFloat16:
      return with_kernels_of<kComparison, bfloat16>(a, use);
    default:
      return with_kernels_of<kComparison, float16>(a, use);
  }
}

template <typename Use>
auto with_kernels(Comparison comparison, Element element, const QKArgs& a, const Use& use) {
  switch (comparison) {
    case Comparison::kKl:
      return with_element<Comparison::kKl>(element, a, use);
    case Comparison::kJs:
      return with_element<Comparison::kJs>(element, a, use);
    case Comparison::kScores:
      return with_element<Comparison::kScores>(element, a, use);
    default:
      return with_element<Comparison::kMse>(element, a, use);
  }
}

}  // namespace

int64_t qk_forward_blocks(Comparison comparison, Element element, const QKArgs& args) {
  const int rows =
      comparison == Comparison::kMse && hopper_takes_forward(element, args)
          ? kHopperRows
          : with_kernels(comparison, element, args, [&](auto kernels) { return kernels.rows_of_a_block(args); });
  return (args.queries + rows - 1) / rows;
}

const char* launch_qk_forward(Comparison comparison, Element element, const QKArgs& args, void* stream) {
  if (comparison == Comparison::kMse && hopper_takes_forward(element, args))
    return launch_hopper_forward(element, args, stream);
  return with_kernels(comparison, element, args, [&](auto kernels) { return kernels.forward(args, stream); });
}

const char* launch_qk_backward(Comparison comparison, Element element, const QKArgs& args, void* stream) {
  if (comparison == Comparison::kMse && hopper_takes_backward(element, args))
    return launch_hopper_backward(element, args, stream);
  return with_kernels(comparison, element, args, [&](auto kernels) { return kernels.backward(args, stream); });
}

}  // namespace ear_ops::cuda
