// Starts the attention_mse kernels.
#include "attention_mse.cuh"
#include "element.cuh"

namespace ear_ops::cuda {

namespace {

const char* run(Element element, bool backward, const MapsArgs& a, void* stream) {
  const int64_t blocks = a.pairs * a.heads * ((a.queries + a.rows_per_block - 1) / a.rows_per_block);
  return with_element(element, a.vectorized, [&](auto type, auto vectorized) {
    using T = decltype(type);
    constexpr bool kVectorized = decltype(vectorized)::value;
    return launch(backward ? &maps_backward<T, kVectorized> : &maps_forward<T, kVectorized>, blocks, kMapsThreads,
                  kMapsThreads / kWarp * 4, stream, a);
  });
}

}  // namespace

const char* launch_maps_forward(Element element, const MapsArgs& args, void* stream) {
  return run(element, false, args, stream);
}
const char* launch_maps_backward(Element element, const MapsArgs& args, void* stream) {
  return run(element, true, args, stream);
}

}  // namespace ear_ops::cuda
