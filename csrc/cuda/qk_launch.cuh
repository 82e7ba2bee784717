// Starts the qk_attention_mse kernels of one element type and tile width; instances/qk_*.cu hold them.
#pragma once

#include "qk_attention_mse.cuh"

namespace ear_ops::cuda {

template <typename T, int kD>
struct QKKernels {
  static int chunks(const QKArgs& a) { return (a.dim + kD - 1) / kD; }
  static int64_t short_bytes() { return 3 * tile_bytes<T, kD>(); }
  static int64_t long_bytes(int chunks) { return Stages<T, kD, kColumns, Role::kQueries>::bytes(chunks); }
  static int64_t backward_bytes(int chunks) { return Stages<T, kD, gradient_columns(kD), Role::kKeys>::bytes(chunks); }
  // What the largest kernel asks of a block's shared memory.
  static int64_t shared_bytes(const QKArgs& a) {
    const int64_t forward = long_bytes(chunks(a)), backward = backward_bytes(chunks(a));
    return forward > backward ? forward : backward;
  }

  static const char* run_forward(const QKArgs& a, void* stream) {
    const int64_t blocks = a.pairs * a.heads * blocks_of(a.queries);
    if (chunks(a) == 1 && a.keys <= kShortKeys)
      return launch(&forward_short<T, kD>, blocks, kThreads, short_bytes(), stream, a);
    return launch(&forward_long<T, kD>, blocks, kThreads, long_bytes(chunks(a)), stream, a);
  }
  static const char* run_backward(const QKArgs& a, void* stream) {
    const bool queries = a.query[0].gradient || a.query[1].gradient, keys = a.key[0].gradient || a.key[1].gradient;
    const int64_t per_head =
        (queries ? int64_t(a.heads / a.key_heads) * blocks_of(a.queries) : 0) + (keys ? int64_t(blocks_of(a.keys)) : 0);
    return launch(&backward<T, kD>, a.pairs * a.key_heads * per_head * chunks(a), kThreads, backward_bytes(chunks(a)),
                  stream, a);
  }
};

}  // namespace ear_ops::cuda
