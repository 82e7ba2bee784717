// Attention-matrix MSE straight from Q and K. A block of threads owns 64 rows, 16 a warp, and visits tiles of columns;
// scores, probabilities and their gradients live in registers. In the forward and for the gradient of the queries it
// owns queries and visits keys; for the gradient of the keys it is the other way round. Every number is written by the
// one block that owns it: no atomics, the same bits every time.
//
// Head dimensions beyond kD come in chunks of kD columns: scores are sums over all of them, and a block makes the
// gradient of one. Lane l = 4 g + t of a warp holds rows g and g + 8 ("half" 0 and 1) and columns 2t, 2t + 1 of
// every 8.
#pragma once

#include "qk_tile.cuh"

namespace ear_ops::cuda {

constexpr float kLog2E = 1.4426950408889634f;

EAR_OPS_DEVICE int warp_index() { return thread_index() / kWarp; }
EAR_OPS_DEVICE int row_of_lane(int half) { return warp_index() * 16 + thread_index() % kWarp / 4 + 8 * half; }
EAR_OPS_DEVICE int column_of_lane(int element) { return thread_index() % 4 * 2 + element % 2; }

EAR_OPS_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
EAR_OPS_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

// What a softmax subtracts: nothing where there is no score at all, so that infinities never meet.
EAR_OPS_DEVICE float shift_of(float maximum) { return maximum == -infinity() ? 0.0f : maximum; }
EAR_OPS_DEVICE float exponential(float score, float shift) { return exp2_fast((score - shift) * kLog2E); }

// The address of a row's statistics [6, B, H, L]; consecutive ones are B * H * L apart.
EAR_OPS_DEVICE int64_t stats_index(const QKArgs& a, int64_t pair, int head, int query) {
  return (pair * a.heads + head) * a.queries + query;
}
EAR_OPS_DEVICE int64_t stats_step(const QKArgs& a) { return a.pairs * a.heads * a.queries; }

// Scores as they come out of the products, to scaled and biased ones; -infinity where a pair is not compared. Sets a
// bit of `alive` (half + 2 view) where one is.
template <int kN, Role kOwner>
EAR_OPS_DEVICE void finish_scores(const QKArgs& a, int64_t pair, int head, int first_row, int first_column,
                                  const bool (&row_real)[2][2], const Real<kN>& column_real,
                                  float (&scores)[2][kN / 8][4], uint32_t* alive) {
  const Structure structure(a);
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int half = e / 2, c = column_of_lane(e);
      const int row = first_row + row_of_lane(half), column = first_column + n * 8 + c;
      const int query = kOwner == Role::kQueries ? row : column, key = kOwner == Role::kQueries ? column : row;
      const bool allowed = structure.allows(query, key);
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        float score = -infinity();
        if (allowed && row_real[v][half] && column_real(v, n, c)) {
          float bias = 0;
          if (a.bias[v].data) {
            const Strides& s = a.bias[v].strides;
            bias = load_global(a.bias[v].data + pair * s.batch + head * s.head + query * s.row + key * s.column);
          }
          if (bias != -infinity()) {
            score = scores[v][n][e] * a.scale + bias;
            *alive |= 1u << (half + 2 * v);
          }
        }
        scores[v][n][e] = score;
      }
    }
}

template <Role kOwner>
EAR_OPS_DEVICE void real_rows(const Rows<kOwner>& rows, int first_row, bool (&real)[2][2]) {
#pragma unroll
  for (int v = 0; v < 2; ++v)
#pragma unroll
    for (int half = 0; half < 2; ++half) real[v][half] = rows.real(v, first_row + row_of_lane(half));
}

template <typename T, int kD>
EAR_OPS_CONSTANT int tile_bytes() {  // of both views
  return 2 * Tile<T, kD>::bytes(kBlockRows);
}

template <int kN>
EAR_OPS_DEVICE void clear(float (&scores)[2][kN][4]) {
#pragma unroll
  for (int v = 0; v < 2; ++v)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[v][n][e] = 0;
}

template <typename T, int kD, int kN, Role kOwner>
EAR_OPS_DEVICE void add_scores(const char* owned, const char* visited, float (&scores)[2][kN / 8][4]) {
  using Layout = Tile<T, kD>;
#pragma unroll
  for (int v = 0; v < 2; ++v)
    Products<T>::template add_scores<kD, kN, kOwner == Role::kKeys>(
        owned + v * Layout::bytes(kBlockRows) + Layout::bytes(16) * warp_index(), visited + v * Layout::bytes(kN),
        scores[v]);
}

}  // namespace ear_ops::cuda
