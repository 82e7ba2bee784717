// Starts the attention_mse and pooled_distance kernels.
#include "attention_mse.cuh"
#include "pooled_distance.cuh"

namespace ear_ops::cuda {

namespace {

// body(a value of the element type, whether rows are read 16 bytes at a time, as a type)
template <typename Body>
const char* with_element(Element element, bool pieces, const Body& body) {
  switch (element) {
    case Element::kFloat32:
      return pieces ? body(float{}, std::true_type{}) : body(float{}, std::false_type{});
    case Element::kBFloat16:
      return pieces ? body(bfloat16{}, std::true_type{}) : body(bfloat16{}, std::false_type{});
    default:
      return pieces ? body(float16{}, std::true_type{}) : body(float16{}, std::false_type{});
  }
}

const char* run_maps(Element element, bool backward, const MapsArgs& a, void* stream) {
  const int64_t blocks = a.pairs * a.heads * ((a.queries + a.rows_per_block - 1) / a.rows_per_block);
  return with_element(element, a.pieces, [&](auto type, auto pieces) {
    using T = decltype(type);
    constexpr bool kPieces = decltype(pieces)::value;
    return launch(backward ? &maps_backward<T, kPieces> : &maps_forward<T, kPieces>, blocks, kMapsThreads,
                  kMapsThreads / kWarp * 4, stream, a);
  });
}

const char* run_pooled(Element element, bool backward, const PooledArgs& a, void* stream) {
  const int slice = pooled_slice(element);
  const int64_t blocks = a.pairs * ((a.features + slice - 1) / slice);
  return with_element(element, a.pieces, [&](auto type, auto pieces) {
    using T = decltype(type);
    constexpr bool kPieces = decltype(pieces)::value;
    return launch(backward ? &pooled_backward<T, kPieces> : &pooled_forward<T, kPieces>, blocks, kPooledThreads,
                  pooled_shared_bytes<T>(), stream, a);
  });
}

}  // namespace

const char* attention_mse_forward(Element element, const MapsArgs& args, void* stream) {
  return run_maps(element, false, args, stream);
}
const char* attention_mse_backward(Element element, const MapsArgs& args, void* stream) {
  return run_maps(element, true, args, stream);
}
const char* pooled_distance_forward(Element element, const PooledArgs& args, void* stream) {
  return run_pooled(element, false, args, stream);
}
const char* pooled_distance_backward(Element element, const PooledArgs& args, void* stream) {
  return run_pooled(element, true, args, stream);
}

}  // namespace ear_ops::cuda
