// The sum of (P - T)^2 over 64 rows and the statistics of each row.
//
// forward_short takes rows of at most 128 keys and one chunk of the head dimension, in one sweep.
//
//   global memory   Q [64, D] and K [S, D] of both views
//                     | cp.async, all at once
//   shared memory   Q, K of tile 0, K of tile 1
//                     | mma
//   registers       scores of 64 x 128, both views --> max of the row --> exp, sum --> P - T --> square, d
//   written         row_stats [6, B, H, L]: max, 1 / sum, d; block_sums: one sum of squares
//
// forward_long takes rows of any length, in two sweeps over tiles of 64 keys that come through the stages of
// qk_steps.cuh.
//
//   registers       sweep 1: scores of 64 x 64 --> running max and sum of this lane --> max, 1 / sum of the row
//                   sweep 2: the same scores   --> P - T --> square, d
//   written         as in forward_short
#pragma once

#include "qk_steps.cuh"

namespace ear_ops::cuda {

// The statistics of this lane's two rows. Until `finish`, `inverse` is this lane's own sum of exponentials, relative to
// `maximum`; after it, both are the row's and inverse is 1 / sum. d is this lane's part until write_forward.
struct ForwardRows {
  float maximum[2][2], inverse[2][2], d[2][2];
  uint32_t alive;

  EAR_OPS_DEVICE ForwardRows() : alive(0) {
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half) maximum[v][half] = -infinity(), inverse[v][half] = 0, d[v][half] = 0;
  }

  // A row that compares nothing gets 0. A row of nothing but -infinity has no softmax either: it shows as NaN in the
  // lanes that hold such scores.
  EAR_OPS_DEVICE void finish() {
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float own = maximum[v][half], shift = shift_of(quad_max(own));
        const float sum = quad_sum(inverse[v][half] * exponential(own, shift));
        maximum[v][half] = shift;
        inverse[v][half] = sum == 0 ? (alive >> (half + 2 * v) & 1 ? not_a_number() : 0.0f) : 1 / sum;
      }
  }
};

// Raises the maxima to the largest scores of a tile.
template <int kN>
EAR_OPS_DEVICE void raise_maxima(const float (&scores)[2][kN / 8][4], ForwardRows& rows) {
#pragma unroll
  for (int v = 0; v < 2; ++v)
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) rows.maximum[v][e / 2] = fmaxf(rows.maximum[v][e / 2], scores[v][n][e]);
}

// Turns scores into exponentials, under maxima that are final, and sums them.
template <int kN>
EAR_OPS_DEVICE void to_exponentials(float (&scores)[2][kN / 8][4], ForwardRows& rows) {
#pragma unroll
  for (int v = 0; v < 2; ++v)
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[v][n][e] = exponential(scores[v][n][e], rows.maximum[v][e / 2]);
        rows.inverse[v][e / 2] += scores[v][n][e];
      }
}

// Adds one tile of many to the sums, under a running maximum of this lane: a greater maximum rescales the sums so far.
template <int kN>
EAR_OPS_DEVICE void add_to_softmax(const float (&scores)[2][kN / 8][4], ForwardRows& rows) {
#pragma unroll
  for (int v = 0; v < 2; ++v)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = rows.maximum[v][half];
      float maximum = before;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
        maximum = fmaxf(maximum, fmaxf(scores[v][n][2 * half], scores[v][n][2 * half + 1]));
      const float shift = shift_of(maximum);
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
        sum += exponential(scores[v][n][2 * half], shift) + exponential(scores[v][n][2 * half + 1], shift);
      rows.inverse[v][half] = rows.inverse[v][half] * exponential(before, shift) + sum;
      rows.maximum[v][half] = maximum;
    }
}

// Returns sum (P - T)^2 over a tile, and adds the tile's part of d = sum P (P - T) and d_a = sum T (T - P).
template <int kN, bool kExponentials>
EAR_OPS_DEVICE float compare(const float (&scores)[2][kN / 8][4], ForwardRows& rows) {
  float total = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float d[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        float value[2] = {scores[0][n][e], scores[1][n][e]};
        if (!kExponentials)
#pragma unroll
          for (int v = 0; v < 2; ++v) value[v] = exponential(value[v], rows.maximum[v][half]);
        const float p = product(value[0], rows.inverse[0][half]), t = product(value[1], rows.inverse[1][half]);
        const float difference = p - t;
        total += difference * difference;
        d[0] += p * difference;
        d[1] -= t * difference;
      }
    rows.d[0][half] += d[0];
    rows.d[1][half] += d[1];
  }
  return total;
}

EAR_OPS_DEVICE void write_forward(const QKArgs& a, int64_t pair, int head, int block, float total, ForwardRows& rows) {
  const int64_t step = stats_step(a);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const float d = quad_sum(rows.d[v][half]);
      const int query = block * kOwned + owned_of_lane(half);
      if (thread_index() % 4 != 0 || query >= a.queries) continue;
      float* to = a.row_stats + stats_index(a, pair, head, query);
      store_global(to + v * step, rows.maximum[v][half]);
      store_global(to + (2 + v) * step, rows.inverse[v][half]);
      store_global(to + (4 + v) * step, d);
    }
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) total += shuffle_xor(total, lanes);
  char* sums = shared_memory();  // nobody reads vectors any more
  sync_block();
  if (thread_index() % kWarp == 0) store_shared(sums + warp_index() * 4, total);
  sync_block();
  if (thread_index() != 0) return;
  total = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += load_shared<float>(sums + warp * 4);
  store_global(a.block_sums + (pair * a.heads + head) * ((a.queries + kOwned - 1) / kOwned) + block, total);
}

constexpr int kShortKeys = 2 * kVisited;  // keys of a row up to which forward_short takes it

template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, 1)
forward_short(EAR_OPS_ARGUMENT const QKArgs a) {
  const int blocks = (a.queries + kOwned - 1) / kOwned;
  const int block = block_index() % blocks, head = block_index() / blocks % a.heads;
  const int64_t pair = block_index() / blocks / a.heads;
  const int first_owned = block * kOwned;
  const Vectors<Role::kQueries> queries{a, pair, head};
  const Vectors<Role::kKeys> keys{a, pair, head / (a.heads / a.key_heads)};
  ForwardRows rows;
  float total = 0;
  if (Real<kOwned>(queries, first_owned).any()) {
    char* owned = shared_memory();
    copy_vectors<T, kD, kOwned>(owned, queries, first_owned, 0);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
      if (tile * kVisited < a.keys)
        copy_vectors<T, kD, kVisited>(owned + (1 + tile) * views_bytes<T, kD>(), keys, tile * kVisited, 0);
    commit_copies();
    bool owned_real[2][2];
    real_owned(queries, first_owned, owned_real);
    float scores[2][2][kVisited / 8][4];
    wait_copies<0>();
    sync_block();
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      if (tile * kVisited >= a.keys) continue;
      clear(scores[tile]);
      add_scores<T, kD, kVisited, Role::kQueries>(owned, owned + (1 + tile) * views_bytes<T, kD>(), scores[tile]);
      finish_scores<kVisited, Role::kQueries>(a, pair, head, first_owned, tile * kVisited, owned_real,
                                              Real<kVisited>(keys, tile * kVisited), scores[tile], &rows.alive);
      raise_maxima<kVisited>(scores[tile], rows);
    }
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half) rows.maximum[v][half] = shift_of(quad_max(rows.maximum[v][half]));
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
      if (tile * kVisited < a.keys) to_exponentials<kVisited>(scores[tile], rows);
    rows.finish();
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
      if (tile * kVisited < a.keys) total += compare<kVisited, true>(scores[tile], rows);
  }
  write_forward(a, pair, head, block, total, rows);
}

template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, 1)
forward_long(EAR_OPS_ARGUMENT const QKArgs a) {
  const int blocks = (a.queries + kOwned - 1) / kOwned;
  const int block = block_index() % blocks, head = block_index() / blocks % a.heads;
  const int64_t pair = block_index() / blocks / a.heads;
  const int first_owned = block * kOwned, chunks = (a.dim + kD - 1) / kD;
  const Vectors<Role::kQueries> queries{a, pair, head};
  ForwardRows rows;
  float total = 0;
  if (Real<kOwned>(queries, first_owned).any()) {
    bool owned_real[2][2];
    real_owned(queries, first_owned, owned_real);
    const Stages<T, kD, kVisited, Role::kQueries> stages{queries, first_owned, chunks};
    const Steps<kVisited, Role::kQueries> steps(a, pair, first_owned, head, head + 1, chunks, chunks - 1);
    auto finish = [&](const Steps<kVisited, Role::kQueries>& step, float (&scores)[2][kVisited / 8][4]) {
      finish_scores<kVisited, Role::kQueries>(a, pair, head, first_owned, step.first_visited, owned_real,
                                              Real<kVisited>(step.visited(), step.first_visited), scores, &rows.alive);
    };
    for_tiles(stages, steps, [&](const auto& step, auto& scores, int) {
      finish(step, scores);
      add_to_softmax<kVisited>(scores, rows);
    });
    rows.finish();
    for_tiles(stages, steps, [&](const auto& step, auto& scores, int) {
      finish(step, scores);
      total += compare<kVisited, false>(scores, rows);
    });
  }
  write_forward(a, pair, head, block, total, rows);
}

}  // namespace ear_ops::cuda
