// Starts the pooled_distance kernels.
#include "element.cuh"
#include "pooled_distance.cuh"

namespace ear_ops::cuda {

namespace {

const char* run(Element element, bool backward, const PooledArgs& a, void* stream) {
  const int slice = pooled_slice(element);
  const int64_t blocks = a.pairs * ((a.features + slice - 1) / slice);
  return with_element(element, a.vectorized, [&](auto type, auto vectorized) {
    using T = decltype(type);
    constexpr bool kVectorized = decltype(vectorized)::value;
    return launch(backward ? &pooled_backward<T, kVectorized> : &pooled_forward<T, kVectorized>, blocks, kPooledThreads,
                  pooled_shared_bytes<T>(), stream, a);
  });
}

}  // namespace

const char* launch_pooled_forward(Element element, const PooledArgs& args, void* stream) {
  return run(element, false, args, stream);
}
const char* launch_pooled_backward(Element element, const PooledArgs& args, void* stream) {
  return run(element, true, args, stream);
}

}  // namespace ear_ops::cuda
