// Starts the kernels of one comparison, element type and chunk of the head dimension.
#pragma once

#include "qk_backward_short.cuh"
#include "qk_divergences.cuh"
#include "qk_forward.cuh"
#include "qk_kernels.h"
#include "qk_squared_scores.cuh"

namespace ear_ops::cuda {

template <Comparison kComparison>
struct ComparedAs;
template <>
struct ComparedAs<Comparison::kMse> {
  using Type = Mse;
};
template <>
struct ComparedAs<Comparison::kKl> {
  using Type = Kl;
};
template <>
struct ComparedAs<Comparison::kJs> {
  using Type = Js;
};
template <>
struct ComparedAs<Comparison::kScores> {
  using Type = SquaredScores;
};

inline int chunks_of(const QKArgs& a, int features) { return (a.dim + features - 1) / features; }

// Whether positions or a bias decide which scores are compared, and not masks of queries and keys alone.
inline bool is_general(const QKArgs& a) { return a.is_causal || a.window || a.bias[0].data || a.bias[1].data; }

// Shared memory of forward_short with `rows` queries and keys.
template <typename T, int kD>
constexpr int64_t short_forward_bytes(int rows) {
  return 4 * SharedVectors<T, kD>::bytes(rows);
}

constexpr int64_t kMostShared = 227 * 1024;  // bytes that a block can have on any GPU

// Whether the kernels for long rows without bias, window and causal mask are compiled for a comparison.
constexpr bool has_plain_kernels(Comparison c) { return c == Comparison::kMse; }

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

template <Comparison kComparison, typename T, int kD>
int QKKernels<kComparison, T, kD>::rows_of_a_block(const QKArgs& a) {
  const int rows = rows_of_short_forward<T, kD>(a);
  return rows ? rows : kOwned;
}

template <Comparison kComparison, typename T, int kD, bool kGeneral>
constexpr int64_t backward_bytes(int chunks) {
  return Stages<T, kD, gradient_visited<T>(kD, kGeneral), Role::kKeys, row_stats_of(kComparison)>::bytes(chunks);
}

template <Comparison kComparison, typename T, int kD>
int64_t QKKernels<kComparison, T, kD>::shared_bytes(const QKArgs& a) {
  const int chunks = chunks_of(a, kD);
  const int64_t forward = Stages<T, kD, kVisited, Role::kQueries>::bytes(chunks);
  const int64_t backward =  // which needs no more where it asks about every score
      backward_bytes<kComparison, T, kD, !has_plain_kernels(kComparison)>(chunks);
  return forward > backward ? forward : backward;
}

template <Comparison kComparison, typename T, int kD>
const char* QKKernels<kComparison, T, kD>::forward(const QKArgs& a, void* stream) {
  using Compared = typename ComparedAs<kComparison>::Type;
  const int rows = rows_of_a_block(a);
  const int64_t blocks = a.pairs * a.heads * ((a.queries + rows - 1) / rows);
  const int short_rows = rows_of_short_forward<T, kD>(a);
  if (short_rows == 64)
    return launch(&forward_short<T, kD, 64, Compared>, blocks, 128, short_forward_bytes<T, kD>(64), stream, a);
  if constexpr (short_forward_bytes<T, kD>(128) <= kMostShared)
    if (short_rows == 128)
      return launch(&forward_short<T, kD, 128, Compared>, blocks, 256, short_forward_bytes<T, kD>(128), stream, a);
  auto* kernel = &forward_long<T, kD, true, Compared>;
  if constexpr (has_plain_kernels(kComparison))
    if (!is_general(a)) kernel = &forward_long<T, kD, false, Compared>;
  return launch(kernel, blocks, kThreads, Stages<T, kD, kVisited, Role::kQueries>::bytes(chunks_of(a, kD)), stream, a);
}

// Starts backward_short with kRows rows if it takes the call.
template <typename T, int kD, int kRows, typename Compared>
bool run_short_backward(const QKArgs& a, void* stream, const char** error) {
  if constexpr (sizeof(T) == 2) {
    using Short = ShortBackward<T, kD, kRows, Compared>;
    if (is_general(a) || a.heads != a.key_heads || a.dim > kD || a.keys > kRows || a.queries > kRows) return false;
    if (Short::kBytes > shared_memory_limit()) return false;
    *error =
        launch(&backward_short<T, kD, kRows, Compared>, a.pairs * a.heads, Short::kThreads, Short::kBytes, stream, a);
    return true;
  }
  return false;
}

template <Comparison kComparison, typename T, int kD>
const char* QKKernels<kComparison, T, kD>::backward(const QKArgs& a, void* stream) {
  using Compared = typename ComparedAs<kComparison>::Type;
  const char* error = nullptr;
  if (run_short_backward<T, kD, 64, Compared>(a, stream, &error) ||
      run_short_backward<T, kD, 128, Compared>(a, stream, &error))
    return error;
  const int chunks = chunks_of(a, kD);
  const bool queries = a.query[0].gradient || a.query[1].gradient, keys = a.key[0].gradient || a.key[1].gradient;
  const int64_t per_head =
      (queries ? int64_t(a.heads / a.key_heads) * blocks_of(a.queries) : 0) + (keys ? int64_t(blocks_of(a.keys)) : 0);
  const int64_t blocks = a.pairs * a.key_heads * per_head * chunks;
  if constexpr (has_plain_kernels(kComparison))
    if (!is_general(a))
      return launch(&cuda::backward<T, kD, false, Compared>, blocks, kThreads,
                    backward_bytes<kComparison, T, kD, false>(chunks), stream, a);
  return launch(&cuda::backward<T, kD, true, Compared>, blocks, kThreads,
                backward_bytes<kComparison, T, kD, true>(chunks), stream, a);
}

}  // namespace ear_ops::cuda
