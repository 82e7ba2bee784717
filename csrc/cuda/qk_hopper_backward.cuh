// The gradients of qk_backward.cuh for Hopper: of 128 queries or 128 keys, for rows of any length, without bias,
// window, causal mask and masks, in 16 bits.
//
//   global memory   owned vectors, and visited ones tile by tile
//                     | TMA, asked for by one warp, as far ahead as there are stages
//   shared memory   owned vectors, and a ring of tiles of 64 visited ones
//                     | wgmma of owned and visited vectors
//   registers       scores of 64 x 64 a group of four warps, both views --> dS = P ((P - T) - d)
//                     | wgmma of dS, from registers, and the same tile
//   registers       gradient [64, kD] a group, of each view
//                     | times 2 scale g, rounded, through shared memory for accesses of 16 bytes
//   written         dQ or dK of the owned vectors
#pragma once

#include "qk_backward.cuh"
#include "qk_hopper.cuh"

namespace ear_ops::cuda {

template <int kD>
using GradientRing = Ring<kD, kHopperGradientRows>;

// Four warps more than own vectors: only a whole group can give registers away. One of them asks for copies.
constexpr int kGradientThreads = (kHopperGradientRows / 16 + 4) * kWarp;

template <typename T, int kD>
EAR_OPS_CONSTANT int gradient_bytes() {  // of shared memory: the ring, and 16 vectors of each warp that are written
  return GradientRing<kD>::kBytes + SharedVectors<T, kD>::bytes(kHopperGradientRows);
}

// Calls body(query head, first visited vector) for every tile that a block visits.
template <typename Body>
EAR_OPS_DEVICE void for_visited(int first_head, int end_head, int count, const Body& body) {
  for (int head = first_head; head < end_head; ++head)
    for (int first = 0; first < count; first += kVisited) body(head, first);
}

template <typename T, int kD, Role kOwner>
EAR_OPS_KERNEL(kGradientThreads, 1)
gradient_hopper(EAR_OPS_ARGUMENT const HopperArgs h) {
  using R = GradientRing<kD>;
  constexpr bool kQueries = kOwner == Role::kQueries;
  constexpr Role kVisitedRole = kQueries ? Role::kKeys : Role::kQueries;
  const QKArgs& a = h.args;
  const int group = a.heads / a.key_heads, heads = kQueries ? a.heads : a.key_heads;
  const int count = kQueries ? a.queries : a.keys, visited_count = kQueries ? a.keys : a.queries;
  const int blocks = (count + R::kRows - 1) / R::kRows;
  const int index = static_cast<int>(block_index()), row = index / blocks;
  const int first_owned = (index - row * blocks) * R::kRows, head = row % heads;
  const int64_t pair = row / heads;
  const int first_head = kQueries ? head : head * group, end_head = kQueries ? head + 1 : first_head + group;
  if (thread_index() == 0) R::init();
  sync_block();
  typename R::Turn turn;
  if (warp_index() >= R::kConsumers) {
    give_registers<24>();
    if (warp_index() > R::kConsumers) return;
    const bool asks = thread_index() % kWarp == 0;
    if (asks)
      R::copy(R::owned(), R::kOwnedBytes, kQueries ? h.query : h.key, first_owned, head, static_cast<int>(pair),
              R::owned_full());
    for_visited(first_head, end_head, visited_count, [&](int query_head, int first) {
      wait_phase(R::empty(turn.stage), turn.parity ^ 1);
      if (asks)
        R::copy(R::visited(turn.stage), R::kVisitedBytes, kQueries ? h.key : h.query, first,
                kQueries ? query_head / group : query_head, static_cast<int>(pair), R::full(turn.stage));
      turn.advance();
    });
    return;
  }

  take_registers<240>();
  const Vectors<kOwner> owned{a, pair, head};
  float gradient[2][kD / 8][4];
  clear(gradient);
  bool owned_real[2][2];
  real_owned(owned, first_owned, owned_real);
  const auto stat_of = [&](int query_head, int query, int k, int v) {
    return query < a.queries
               ? load_global(a.row_stats + (2 * k + v) * stats_step(a) + stats_index(a, pair, query_head, query))
               : 0.0f;
  };
  float row_stats[3][2][2];  // of the owned queries
  if (kQueries) {
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int k = 0; k < 3; ++k) row_stats[k][v][half] = stat_of(head, first_owned + owned_of_lane(half), k, v);
  }
  const float upstream = largest_upstream(a, pair, first_head, end_head);
  const int of_group = uniform(warp_index() / 4) * R::kGroupBytes;
  wait_phase(R::owned_full(), 0);
  for_visited(first_head, end_head, visited_count, [&](int query_head, int first) {
    float scores[2][kVisited / 8][4];
    const float share = load_global(a.grad_sums + pair * a.heads + query_head) / upstream * gradient_range<T, Mse>();
    const Real<kVisited> visited_real(Vectors<kVisitedRole>{a, pair, query_head}, first);
    wait_phase(R::full(turn.stage), turn.parity);
    R::template start_scores<T>(of_group, turn.stage, scores);
    wait_products(scores);
    uint32_t alive = 0;
    finish_scores<kVisited, kOwner, false>(a, pair, query_head, 0, 0, owned_real, visited_real, scores, &alive);
#pragma unroll
    for (int n = 0; n < kVisited / 8; ++n)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        float stats[3][2];  // of the visited query
        if (!kQueries) {
#pragma unroll
          for (int k = 0; k < 3; ++k)
#pragma unroll
            for (int v = 0; v < 2; ++v) stats[k][v] = stat_of(query_head, first + n * 8 + visited_of_lane(odd), k, v);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto stat = [&](int k, int v) { return kQueries ? row_stats[k][v][half] : stats[k][v]; };
          float p[2];
#pragma unroll
          for (int v = 0; v < 2; ++v) p[v] = product(exponential(scores[v][n][2 * half + odd], stat(0, v)), stat(1, v));
#pragma unroll
          for (int v = 0; v < 2; ++v) scores[v][n][2 * half + odd] = share * (p[v] * ((p[v] - p[1 - v]) - stat(2, v)));
        }
      }
    uint32_t weights[2][kVisited / 16][4];
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int k = 0; k < kVisited / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float (&from)[4] = scores[v][2 * k + i / 2];
          weights[v][k][i] = pack_two(T{}, from[i % 2 * 2], from[i % 2 * 2 + 1]);
        }
    const Matrix visited = matrix_at(R::visited(turn.stage));
    begin_products();
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int k = 0; k < kVisited / 16; ++k)
        add_weighted_async(T{}, gradient[v], weights[v][k],
                           further(visited, v * R::kTiles * R::kVisitedBytes + k * 16 * kTileRowBytes));
    commit_products();
    wait_products(gradient);
    keep(weights);
    if (thread_index() % kWarp == 0) arrive(R::empty(turn.stage));
    turn.advance();
  });

  const int first_of_warp = first_owned + warp_index() * 16;
  const float factor = 2 * a.scale * upstream / gradient_range<T, Mse>();
  char* scratch = shared_memory() + R::kBytes + warp_index() * SharedVectors<T, kD>::bytes(16);
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    T* to = static_cast<T*>((kQueries ? a.query : a.key)[v].gradient) +
            ((pair * heads + head) * count + first_of_warp) * a.dim;
    write_gradient<T, kD>(gradient[v], factor, owned_real[v], scratch, to, count - first_of_warp, a.dim, a.dim);
  }
}

}  // namespace ear_ops::cuda
