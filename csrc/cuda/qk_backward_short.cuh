// The gradients of all queries and keys of one head, where there are at most kRows of each: scores are made once.
//
//   global memory   Q and K [kRows, D] of both views
//                     | cp.async, all at once
//   shared memory   Q, K
//                     | for each 64 keys: mma, 16 queries a warp
//   registers       scores of 16 x 32 (some comparisons: 16 x 16), both views --> dS, as P ((P - T) - d) of the MSE,
//   rounded
//                     |
//   shared memory   dS [kRows, 64], both views
//                     | mma of dS and K, 16 queries a warp   | mma of dS^T and Q, 16 keys of one view a warp
//   registers       dQ [16, D], both views                 dK [16, D]
//                     | through shared memory, for accesses of 16 bytes
//   written         dQ and dK
//
// Elements have 16 bits. There is no bias, window or causal mask, and each head has keys of its own.
#pragma once

#include "qk_backward.cuh"

namespace ear_ops::cuda {

template <typename T, int kD, int kRows, typename Compared>
struct ShortBackward {
  static constexpr int kThreads = 2 * kRows;
  static constexpr int kBlocks = kD > 64 ? 1 : kRows == 64 ? 3 : 2;  // that a multiprocessor must hold
  // Keys whose scores are in registers at a time. With 512 threads on a multiprocessor, a thread has 128 registers.
  static constexpr int kTile = Compared::kLongSlopes && kBlocks * kThreads == 512 && kD == 64 ? 16 : 32;
  using Layout = SharedVectors<T, kD>;
  using Weights = SharedVectors<T, kVisited>;                // of dS, a row a query
  static constexpr int kVectors = 2 * Layout::bytes(kRows);  // of one role, both views
  static constexpr int64_t kBytes = 2 * kVectors + 2 * Weights::bytes(kRows) + Compared::kRowStats * kRows * 4;

  EAR_OPS_DEVICE static char* queries(int v) { return shared_memory() + v * Layout::bytes(kRows); }
  EAR_OPS_DEVICE static char* keys(int v, int first) { return queries(v) + kVectors + Layout::bytes(first); }
  EAR_OPS_DEVICE static char* weights(int v, int first) {
    return shared_memory() + 2 * kVectors + v * Weights::bytes(kRows) + Weights::bytes(first);
  }

  EAR_OPS_DEVICE static char* stats() { return weights(2, 0); }

  // Puts dS of the warp's 16 queries and kTile keys from `first` on into shared memory, from column `column` on.
  EAR_OPS_DEVICE static void make_weights(const QKArgs& a, const Vectors<Role::kKeys>& visited, int first, int column) {
    float scores[2][kTile / 8][4];
    clear(scores);
    add_scores<T, kD, kTile, Role::kQueries, kRows, kRows>(queries(0), keys(0, first), scores);
    uint32_t alive = 0;
    const bool unused[2][2] = {};
    finish_scores<kTile, Role::kQueries, false, Compared::kInLog2>(a, 0, 0, 0, 0, unused, Real<kTile>(visited, first),
                                                                   scores, &alive);
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float of_row[Compared::kRowStats ? Compared::kRowStats : 1];
#pragma unroll
      for (int k = 0; k < Compared::kRowStats; ++k)
        of_row[k] = load_shared<float>(stats() + (k * kRows + owned_of_lane(half)) * 4);
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
        float slopes[2][2];  // of two keys, both views
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float score[2] = {scores[0][n][2 * half + e], scores[1][n][2 * half + e]};
          const auto stat = [&](int k, int v) { return of_row[2 * k + v]; };
          Compared::template slopes<true>(gradient_range<T, Compared>(), score, stat, slopes[e]);
        }
#pragma unroll
        for (int v = 0; v < 2; ++v)
          store_shared(
              weights(v, warp_index() * 16) + Weights::offset(lane / 4 + 8 * half, column + n * 8 + lane % 4 * 2),
              pack_two(T{}, slopes[0][v], slopes[1][v]));
      }
    }
  }

  // gradient [16, kD] += dS [16, 64] of the warp's queries, times the keys from `first` on.
  EAR_OPS_DEVICE static void add_to_queries(int v, int first, float (&gradient)[kD / 8][4]) {
    const int lane = thread_index() % kWarp;
#pragma unroll 2
    for (int k = 0; k < kVisited; k += 16) {
      uint32_t a[4];
      load_matrices<false>(a, Weights::at(weights(v, warp_index() * 16), lane % 16, k + lane / 16 * 8));
      multiply_row(a, Layout::at(keys(v, first), k + lane % 16, lane / 16 * 8), gradient);
    }
  }

  // gradient [16, kD] = dS^T of the keys in columns [column, column + 16), times all queries.
  EAR_OPS_DEVICE static void add_to_keys(int v, int column, float (&gradient)[kD / 8][4]) {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int k = 0; k < kRows; k += 16) {
      uint32_t a[4];
      load_matrices<true>(a, Weights::at(weights(v, k), lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8));
      multiply_row(a, Layout::at(queries(v), k + lane % 16, lane / 16 * 8), gradient);
    }
  }

  // gradient [16, kD] += a [16, 16] times the 16 vectors whose rows the lanes point to.
  EAR_OPS_DEVICE static void multiply_row(const uint32_t (&a)[4], const char* values, float (&gradient)[kD / 8][4]) {
#pragma unroll
    for (int n = 0; n < kD; n += 16) {
      uint32_t b[4];
      load_matrices<true>(b, values + n * static_cast<int>(sizeof(T)));
      multiply_add(T{}, gradient[n / 8], a, b[0], b[1]);
      multiply_add(T{}, gradient[n / 8 + 1], a, b[2], b[3]);
    }
  }
};

template <typename T, int kD, int kRows, typename Compared>
EAR_OPS_KERNEL(2 * kRows, (ShortBackward<T, kD, kRows, Compared>::kBlocks))
backward_short(EAR_OPS_ARGUMENT const QKArgs a) {
  using Short = ShortBackward<T, kD, kRows, Compared>;
  const int row = static_cast<int>(block_index()), head = row % a.heads;  // row: of [B, H]
  const int64_t pair = row / a.heads;
  const Vectors<Role::kQueries> queries{a, pair, head};
  const Vectors<Role::kKeys> keys{a, pair, head};
  copy_vectors<T, kD, kRows, Short::kThreads>(Short::queries(0), queries, 0, 0);
  copy_vectors<T, kD, kRows, Short::kThreads>(Short::keys(0, 0), keys, 0, 0);
  copy_stats<Compared::kRowStats, kRows, Short::kThreads>(Short::stats(), a, pair, head, 0);
  commit_copies();
  wait_copies<0>();
  sync_block();
  if (queries.masked() || keys.masked()) {
    clear_hidden<T, kD, kRows, Short::kThreads>(Short::queries(0), Real<kRows>(queries, 0));
    clear_hidden<T, kD, kRows, Short::kThreads>(Short::keys(0, 0), Real<kRows>(keys, 0));
    sync_block();
  }

  const auto upstream = [&] { return load_global(a.grad_sums + row); };
  const auto factor = [&] { return Compared::kFactor * a.scale * upstream() / gradient_range<T, Compared>(); };
  // Without an upstream gradient all gradients are zero, also where 0 times infinity would be NaN.
  const auto counts = [&] { return !Compared::kMayBeInfinite || upstream() != 0; };
  float of_queries[2][kD / 8][4];
  clear(of_queries);
#pragma unroll 1
  for (int first = 0; first < a.keys; first += kVisited) {
#pragma unroll 1
    for (int tile = 0; tile < kVisited; tile += Short::kTile) Short::make_weights(a, keys, first + tile, tile);
    sync_warp();
#pragma unroll
    for (int v = 0; v < 2; ++v)
      if (a.query[v].gradient) Short::add_to_queries(v, first, of_queries[v]);
    sync_block();
    // Four times 16 keys, of two views.
#pragma unroll 1
    for (int task = warp_index(); task < 8; task += kRows / 16) {
      const int v = task / 4, column = task % 4 * 16, key = first + column;
      if (!a.key[v].gradient) continue;
      float gradient[1][kD / 8][4];
      clear(gradient);
      Short::add_to_keys(v, column, gradient[0]);
      const int half = thread_index() % kWarp / 4;
      const bool real[2] = {counts() && keys.real(v, key + half), counts() && keys.real(v, key + half + 8)};
      write_gradient<T, kD>(gradient[0], factor(), real, Short::keys(v, key),
                            static_cast<T*>(a.key[v].gradient) + (int64_t(row) * a.keys + key) * a.dim, a.keys - key,
                            a.dim, a.dim);
    }
    sync_block();
  }
  bool owned_real[2][2];
  real_owned(queries, 0, owned_real);
  if (!counts())
#pragma unroll
    for (int v = 0; v < 2; ++v) owned_real[v][0] = owned_real[v][1] = false;
  const int query = warp_index() * 16;
#pragma unroll
  for (int v = 0; v < 2; ++v)
    if (a.query[v].gradient)
      write_gradient<T, kD>(of_queries[v], factor(), owned_real[v], Short::queries(0) + Short::Layout::bytes(query),
                            static_cast<T*>(a.query[v].gradient) + (int64_t(row) * a.queries + query) * a.dim,
                            a.queries - query, a.dim, a.dim);
}

}  // namespace ear_ops::cuda
