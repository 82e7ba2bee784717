// Starts the kernels that compare attention between words.
#include "element.cuh"
#include "qk_words_backward.cuh"
#include "qk_words_forward.cuh"

namespace ear_ops::cuda {

namespace {

constexpr int kWordFeatures = 64;  // of a chunk

// Starts a kernel with tiles as large as the shared memory of a block allows.
template <typename T>
const char* launch_words(void (*kernel)(WordArgs), int64_t blocks, void* stream, WordArgs a) {
  using Memory = WordMemory<T, kWordFeatures>;
  a.tokens_of_view = a.pairs * a.queries, a.firsts_of_view = a.pairs * (a.numbers + 1);
  a.strip_tokens = Memory::bytes(kOwned) <= shared_memory_limit() ? kOwned : kOwned - 16;
  return launch(kernel, blocks, kThreads, Memory::bytes(a.strip_tokens), stream, a);
}

}  // namespace

const char* launch_words_forward(Element element, const WordArgs& a, void* stream) {
  return with_element(element, a.vectorized, [&](auto type, auto) {
    using T = decltype(type);
    return launch_words<T>(&words_forward<T, kWordFeatures>, a.pairs * a.heads * strip_blocks(a), stream, a);
  });
}

const char* launch_words_backward(Element element, const WordArgs& a, void* stream) {
  const int64_t chunks = (a.dim + kWordFeatures - 1) / kWordFeatures, blocks = strip_blocks(a);
  return with_element(element, a.vectorized, [&](auto type, auto) {
    using T = decltype(type);
    const char* error = launch_words<T>(&words_means<T, kWordFeatures>, a.pairs * a.heads * blocks, stream, a);
    if (error) return error;
    const int64_t per_head =
        gradient_turns<T>(a.query[0], a.query[1]) * (a.heads / a.key_heads) + gradient_turns<T>(a.key[0], a.key[1]);
    return launch_words<T>(&words_backward<T, kWordFeatures>, a.pairs * a.key_heads * per_head * blocks * chunks,
                           stream, a);
  });
}

}  // namespace ear_ops::cuda
