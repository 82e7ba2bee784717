// Starts the qk_attention_mse kernels of one element type and chunk of the head dimension.
#pragma once

#include "qk_backward.cuh"
#include "qk_forward.cuh"
#include "qk_kernels.h"

namespace ear_ops::cuda {

template <typename T, int kD>
struct QKBytes {  // of shared memory
  static constexpr int64_t kShort = 3 * views_bytes<T, kD>();
  static int64_t forward(int chunks) { return Stages<T, kD, kVisited, Role::kQueries>::bytes(chunks); }
  static int64_t backward(int chunks) { return Stages<T, kD, gradient_visited<T>(kD), Role::kKeys>::bytes(chunks); }
};

inline int chunks_of(const QKArgs& a, int features) { return (a.dim + features - 1) / features; }

template <typename T, int kD>
int64_t QKKernels<T, kD>::shared_bytes(const QKArgs& a) {
  const int chunks = chunks_of(a, kD);
  const int64_t forward = QKBytes<T, kD>::forward(chunks), backward = QKBytes<T, kD>::backward(chunks);
  return forward > backward ? forward : backward;
}

template <typename T, int kD>
const char* QKKernels<T, kD>::forward(const QKArgs& a, void* stream) {
  using Bytes = QKBytes<T, kD>;
  const int64_t blocks = a.pairs * a.heads * blocks_of(a.queries);
  const int chunks = chunks_of(a, kD);
  if (chunks == 1 && a.keys <= kShortKeys)
    return launch(&forward_short<T, kD>, blocks, kThreads, Bytes::kShort, stream, a);
  return launch(&forward_long<T, kD>, blocks, kThreads, Bytes::forward(chunks), stream, a);
}

template <typename T, int kD>
const char* QKKernels<T, kD>::backward(const QKArgs& a, void* stream) {
  const int chunks = chunks_of(a, kD);
  const bool queries = a.query[0].gradient || a.query[1].gradient, keys = a.key[0].gradient || a.key[1].gradient;
  const int64_t per_head =
      (queries ? int64_t(a.heads / a.key_heads) * blocks_of(a.queries) : 0) + (keys ? int64_t(blocks_of(a.keys)) : 0);
  return launch(&cuda::backward<T, kD>, a.pairs * a.key_heads * per_head * chunks, kThreads,
                QKBytes<T, kD>::backward(chunks), stream, a);
}

}  // namespace ear_ops::cuda
