// The loss of 64 queries and the statistics of their rows: in one sweep over all keys, or in two over tiles of them.
#pragma once

#include "qk_steps.cuh"

namespace ear_ops::cuda {

struct ForwardRows {  // the statistics of this lane's two rows
  float maximum[2][2], inverse[2][2], d[2][2];
  uint32_t alive;

  EAR_OPS_DEVICE ForwardRows() : alive(0) {
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half) maximum[v][half] = -infinity(), inverse[v][half] = 0, d[v][half] = 0;
  }

  // From this lane's maximum and sum of exponentials to the row's, and its reciprocal: 0 in a row that compares
  // nothing. A row of nothing but -infinity has no softmax either, which must show: in the lanes that hold such scores.
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

// The largest scores of a tile so far into `rows`.
template <int kN>
EAR_OPS_DEVICE void raise_maxima(const float (&scores)[2][kN / 8][4], ForwardRows& rows) {
#pragma unroll
  for (int v = 0; v < 2; ++v)
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) rows.maximum[v][e / 2] = fmaxf(rows.maximum[v][e / 2], scores[v][n][e]);
}

// Scores to exponentials, under maxima that are final, and their sums.
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

// The same for one tile of many, under a running maximum of this lane: sums so far are rescaled.
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

// sum (P - T)^2 over a tile, and the tile's part of d = sum P (P - T) and d_a = sum T (T - P).
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
      const int query = block * kBlockRows + row_of_lane(half);
      if (thread_index() % 4 != 0 || query >= a.queries) continue;
      float* to = a.row_stats + stats_index(a, pair, head, query);
      store_global(to + v * step, rows.maximum[v][half]);
      store_global(to + (2 + v) * step, rows.inverse[v][half]);
      store_global(to + (4 + v) * step, d);
    }
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) total += shuffle_xor(total, lanes);
  char* sums = shared_memory();  // nobody reads tiles any more
  sync_block();
  if (thread_index() % kWarp == 0) store_shared(sums + warp_index() * 4, total);
  sync_block();
  if (thread_index() != 0) return;
  total = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += load_shared<float>(sums + warp * 4);
  store_global(a.block_sums + (pair * a.heads + head) * ((a.queries + kBlockRows - 1) / kBlockRows) + block, total);
}

constexpr int kShortKeys = 2 * kColumns;  // rows up to here are compared in one sweep, everything in registers

// Rows of at most kShortKeys keys and kD columns: all of Q and K is asked for at once.
template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, 1)
forward_short(EAR_OPS_ARGUMENT const QKArgs a) {
  const int blocks = (a.queries + kBlockRows - 1) / kBlockRows;
  const int block = block_index() % blocks, head = block_index() / blocks % a.heads;
  const int64_t pair = block_index() / blocks / a.heads;
  const int first_row = block * kBlockRows;
  const Rows<Role::kQueries> queries{a, pair, head};
  const Rows<Role::kKeys> keys{a, pair, head / (a.heads / a.key_heads)};
  ForwardRows rows;
  float total = 0;
  if (Real<kBlockRows>(queries, first_row).any()) {
    char* owned = shared_memory();
    copy_rows<T, kD, kBlockRows>(owned, queries, first_row, 0);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
      if (tile * kColumns < a.keys)
        copy_rows<T, kD, kColumns>(owned + (1 + tile) * tile_bytes<T, kD>(), keys, tile * kColumns, 0);
    commit_copies();
    bool row_real[2][2];
    real_rows(queries, first_row, row_real);
    float scores[2][2][kColumns / 8][4];
    wait_copies<0>();
    sync_block();
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      if (tile * kColumns >= a.keys) continue;
      clear(scores[tile]);
      add_scores<T, kD, kColumns, Role::kQueries>(owned, owned + (1 + tile) * tile_bytes<T, kD>(), scores[tile]);
      finish_scores<kColumns, Role::kQueries>(a, pair, head, first_row, tile * kColumns, row_real,
                                              Real<kColumns>(keys, tile * kColumns), scores[tile], &rows.alive);
      raise_maxima<kColumns>(scores[tile], rows);
    }
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half) rows.maximum[v][half] = shift_of(quad_max(rows.maximum[v][half]));
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
      if (tile * kColumns < a.keys) to_exponentials<kColumns>(scores[tile], rows);
    rows.finish();
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
      if (tile * kColumns < a.keys) total += compare<kColumns, true>(scores[tile], rows);
  }
  write_forward(a, pair, head, block, total, rows);
}

// Rows of any length, in two sweeps: softmax statistics, then the comparison.
template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, 1)
forward_long(EAR_OPS_ARGUMENT const QKArgs a) {
  const int blocks = (a.queries + kBlockRows - 1) / kBlockRows;
  const int block = block_index() % blocks, head = block_index() / blocks % a.heads;
  const int64_t pair = block_index() / blocks / a.heads;
  const int first_row = block * kBlockRows, chunks = (a.dim + kD - 1) / kD;
  const Rows<Role::kQueries> queries{a, pair, head};
  ForwardRows rows;
  float total = 0;
  if (Real<kBlockRows>(queries, first_row).any()) {
    bool row_real[2][2];
    real_rows(queries, first_row, row_real);
    const Stages<T, kD, kColumns, Role::kQueries> stages{queries, first_row, chunks};
    const Steps<kColumns, Role::kQueries> steps(a, pair, first_row, head, head + 1, chunks, chunks - 1);
    auto finish = [&](const Steps<kColumns, Role::kQueries>& step, float (&scores)[2][kColumns / 8][4]) {
      finish_scores<kColumns, Role::kQueries>(a, pair, head, first_row, step.first_column, row_real,
                                              Real<kColumns>(step.visited(), step.first_column), scores, &rows.alive);
    };
    for_tiles(stages, steps, [&](const auto& step, auto& scores, int) {
      finish(step, scores);
      add_to_softmax<kColumns>(scores, rows);
    });
    rows.finish();
    for_tiles(stages, steps, [&](const auto& step, auto& scores, int) {
      finish(step, scores);
      total += compare<kColumns, false>(scores, rows);
    });
  }
  write_forward(a, pair, head, block, total, rows);
}

}  // namespace ear_ops::cuda
