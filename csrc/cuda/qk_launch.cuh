// Starts the qk_attention_mse kernels of one element type and chunk of the head dimension.
#pragma once

#include "qk_backward_short.cuh"
#include "qk_forward.cuh"
#include "qk_kernels.h"

namespace ear_ops::cuda {

inline int chunks_of(const QKArgs& a, int features) { return (a.dim + features - 1) / features; }

// Whether positions or a bias decide which scores are compared, and not masks of queries and keys alone.
inline bool is_general(const QKArgs& a) { return a.is_causal || a.window || a.bias[0].data || a.bias[1].data; }

// Shared memory of forward_short with `rows` queries and keys.
template <typename T, int kD>
constexpr int64_t short_forward_bytes(int rows) {
  return 4 * SharedVectors<T, kD>::bytes(rows);
}

constexpr int64_t kMostShared = 227 * 1024;  // bytes that a block can have on any GPU

// Of forward_short: 64 or 128; 0 where another kernel takes the call.
template <typename T, int kD>
int rows_of_short_forward(const QKArgs& a) {
  if (is_general(a) || a.dim > kD) return 0;
  for (const int rows : {64, 128})
    if (a.keys <= rows && (rows == 128 || a.queries <= rows)) {
      const int64_t bytes = short_forward_bytes<T, kD>(rows);
      return bytes <= kMostShared && bytes <= shared_memory_limit() ? rows : 0;
    }
  return 0;
}

template <typename T, int kD>
int QKKernels<T, kD>::rows_of_a_block(const QKArgs& a) {
  const int rows = rows_of_short_forward<T, kD>(a);
  return rows ? rows : kOwned;
}

template <typename T, int kD, bool kGeneral>
constexpr int64_t backward_bytes(int chunks) {
  return Stages<T, kD, gradient_visited<T>(kD, kGeneral), Role::kKeys>::bytes(chunks);
}

template <typename T, int kD>
int64_t QKKernels<T, kD>::shared_bytes(const QKArgs& a) {
  const int chunks = chunks_of(a, kD);
  const int64_t forward = Stages<T, kD, kVisited, Role::kQueries>::bytes(chunks);
  const int64_t backward = backward_bytes<T, kD, false>(chunks);  // the other one needs no more
  return forward > backward ? forward : backward;
}

template <typename T, int kD>
const char* QKKernels<T, kD>::forward(const QKArgs& a, void* stream) {
  const int short_rows = rows_of_short_forward<T, kD>(a), rows = short_rows ? short_rows : kOwned;
  const int64_t blocks = a.pairs * a.heads * ((a.queries + rows - 1) / rows);
  if (short_rows == 64)
    return launch(&forward_short<T, kD, 64>, blocks, 128, short_forward_bytes<T, kD>(64), stream, a);
  if constexpr (short_forward_bytes<T, kD>(128) <= kMostShared)
    if (short_rows == 128)
      return launch(&forward_short<T, kD, 128>, blocks, 256, short_forward_bytes<T, kD>(128), stream, a);
  return launch(is_general(a) ? &forward_long<T, kD, true> : &forward_long<T, kD, false>, blocks, kThreads,
                Stages<T, kD, kVisited, Role::kQueries>::bytes(chunks_of(a, kD)), stream, a);
}

// Starts backward_short with kRows rows if it takes the call.
template <typename T, int kD, int kRows>
bool run_short_backward(const QKArgs& a, void* stream, const char** error) {
  if constexpr (sizeof(T) == 2) {
    using Short = ShortBackward<T, kD, kRows>;
    if (is_general(a) || a.heads != a.key_heads || a.dim > kD || a.keys > kRows || a.queries > kRows) return false;
    if (Short::kBytes > shared_memory_limit()) return false;
    *error = launch(&backward_short<T, kD, kRows>, a.pairs * a.heads, Short::kThreads, Short::kBytes, stream, a);
    return true;
  }
  return false;
}

template <typename T, int kD>
const char* QKKernels<T, kD>::backward(const QKArgs& a, void* stream) {
  const char* error = nullptr;
  if (run_short_backward<T, kD, 64>(a, stream, &error) || run_short_backward<T, kD, 128>(a, stream, &error))
    return error;
  const int chunks = chunks_of(a, kD);
  const bool queries = a.query[0].gradient || a.query[1].gradient, keys = a.key[0].gradient || a.key[1].gradient;
  const int64_t per_head =
      (queries ? int64_t(a.heads / a.key_heads) * blocks_of(a.queries) : 0) + (keys ? int64_t(blocks_of(a.keys)) : 0);
  const int64_t blocks = a.pairs * a.key_heads * per_head * chunks;
  return is_general(a)
             ? launch(&cuda::backward<T, kD, true>, blocks, kThreads, backward_bytes<T, kD, true>(chunks), stream, a)
             : launch(&cuda::backward<T, kD, false>, blocks, kThreads, backward_bytes<T, kD, false>(chunks), stream, a);
}

}  // namespace ear_ops::cuda
