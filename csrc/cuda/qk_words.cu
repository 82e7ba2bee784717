// Starts the kernels that compare attention between words.
#include "element.cuh"
#include "qk_words_backward.cuh"
#include "qk_words_forward.cuh"

namespace ear_ops::cuda {

namespace {

constexpr int kWordFeatures = 64;  // of a chunk

}  // namespace

const char* launch_words_forward(Element element, const WordArgs& a, void* stream) {
  return with_element(element, a.vectorized, [&](auto type, auto) {
    using T = decltype(type);
    return launch(&words_forward<T, kWordFeatures>, a.pairs * a.heads * strips_of(a), kThreads,
                  WordMemory<T, kWordFeatures>::kBytes, stream, a);
  });
}

const char* launch_words_backward(Element element, const WordArgs& a, void* stream) {
  const int64_t of_strip = (a.dim + kWordFeatures - 1) / kWordFeatures, strips = strips_of(a);
  int64_t per_head = 0;  // heads of queries and of keys that have a gradient, in all views
  for (int v = 0; v < 2; ++v)
    per_head += (a.query[v].gradient ? a.heads / a.key_heads : 0) + (a.key[v].gradient ? 1 : 0);
  return with_element(element, a.vectorized, [&](auto type, auto) {
    using T = decltype(type);
    constexpr int64_t kBytes = WordMemory<T, kWordFeatures>::kBytes;
    const char* error = launch(&words_means<T, kWordFeatures>, a.pairs * a.heads * strips, kThreads, kBytes, stream, a);
    if (error) return error;
    return launch(&words_backward<T, kWordFeatures>, a.pairs * a.key_heads * per_head * strips * of_strip, kThreads,
                  kBytes, stream, a);
  });
}

}  // namespace ear_ops::cuda
