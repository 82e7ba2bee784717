// The gradient of 64 queries or 64 keys, one chunk of their features, from the statistics that the forward kept.
//
//   global memory   owned vectors, and visited ones tile by tile with the row_stats of visited queries
//                     | cp.async, one tile ahead
//   shared memory   owned vectors; stage 0; stage 1
//                     | mma of owned and visited vectors
//   registers       scores of a tile, both views --> dS, as P ((P - T) - d) of the MSE
//                     | mma of dS and visited vectors
//   registers       gradient [64, kD] of each view, summed over all tiles, and over the heads of the group for keys
//                     | times scale g and a number of the comparison, rounded, through shared memory for accesses of 16
//                     bytes
//   written         dQ or dK of the 64 owned vectors
#pragma once

#include <type_traits>

#include "qk_mse.cuh"
#include "qk_steps.cuh"

namespace ear_ops::cuda {

// What dS is multiplied by before it is rounded for the product.
template <typename T, typename Compared>
EAR_OPS_CONSTANT float gradient_range() {
  return std::is_same<T, float16>::value ? Compared::kRange : 1.0f;
}

// How many vectors of a tile a block visits. Registers hold the scores and the gradients of kD features: wide gradients
// leave room for fewer scores, and split floats or scores that are asked about for fewer still.
template <typename T>
EAR_OPS_CONSTANT int gradient_visited(int kD, bool general) {
  if (sizeof(T) == 4) return kD <= 64 ? 32 : 16;
  return kD <= 64 ? 64 : kD <= 96 || !general ? 32 : 16;
}

// Writes a warp's 16 gradients of one view from `to` on, of which `count` exist, `features` of each. Those of vectors
// that are not `real` are zero.
template <typename T, int kD>
EAR_OPS_DEVICE void write_gradient(const float (&gradient)[kD / 8][4], float factor, const bool (&real)[2],
                                   char* scratch, T* to, int count, int dim, int features) {
  using Layout = SharedVectors<T, kD>;
  const int lane = thread_index() % kWarp;
  sync_warp();
#pragma unroll
  for (int n = 0; n < kD / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        T rounded;
        round_to(real[half] ? gradient[n][2 * half + e] * factor : 0.0f, &rounded);
        store_shared(scratch + Layout::offset(lane / 4 + 8 * half, n * 8 + lane % 4 * 2 + e), rounded);
      }
  sync_warp();
  constexpr int kElements = 16 / sizeof(T), kAccesses = kD / kElements;
  for (int i = lane; i < 16 * kAccesses; i += kWarp) {
    const int row = i / kAccesses, c = i % kAccesses * kElements;
    if (row >= count || c >= features) continue;
    const char* from = Layout::at(scratch, row, c);
    if (dim % kElements == 0) {
      store_global(reinterpret_cast<SixteenBytes*>(to + static_cast<int64_t>(row) * dim + c),
                   load_shared<SixteenBytes>(from));
    } else {
      for (int e = 0; e < kElements && c + e < features; ++e)
        store_global(to + static_cast<int64_t>(row) * dim + c + e,
                     load_shared<T>(from + e * static_cast<int>(sizeof(T))));
    }
  }
}

// The upstream gradient is one number a head. It is multiplied in at the end; the heads of a group are weighted by
// their share of the largest one, which this returns, or 1 where it is 0.
EAR_OPS_DEVICE float largest_upstream(const QKArgs& a, int64_t pair, int first_head, int end_head) {
  float upstream = 0;
  for (int h = first_head; h < end_head; ++h) {
    const float one = load_global(a.grad_sums + pair * a.heads + h);
    upstream = end_head - first_head == 1 ? one : fmaxf(upstream, fabsf(one));
  }
  return upstream == 0 ? 1 : upstream;
}

template <typename T, int kD, bool kGeneral, typename Compared, Role kOwner>
EAR_OPS_DEVICE void gradient_block(const QKArgs& a, int64_t pair, int head, int block, int own_chunk) {
  constexpr int kN = gradient_visited<T>(kD, kGeneral), kStats = Compared::kRowStats / 2;  // of a view
  constexpr bool kQueries = kOwner == Role::kQueries;
  const int first_owned = block * kOwned, chunks = (a.dim + kD - 1) / kD, group = a.heads / a.key_heads;
  const Vectors<kOwner> owned{a, pair, head};
  const int first_head = kQueries ? head : head * group, end_head = kQueries ? head + 1 : first_head + group;
  const HeadsPointer* pointers = kQueries ? a.query : a.key;
  const bool wanted[2] = {pointers[0].gradient != nullptr, pointers[1].gradient != nullptr};

  float gradient[2][kD / 8][4];
  clear(gradient);
  bool owned_real[2][2] = {};
  if (!kQueries) real_owned(owned, first_owned, owned_real);
  float row_stats[kStats ? kStats : 1][2][2];  // of the owned queries
  if (kQueries) {
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = first_owned + owned_of_lane(half);
#pragma unroll
        for (int k = 0; k < kStats; ++k)
          row_stats[k][v][half] =
              query < a.queries
                  ? load_global(a.row_stats + (2 * k + v) * stats_step(a) + stats_index(a, pair, head, query))
                  : 0.0f;
      }
  }
  const float upstream = largest_upstream(a, pair, first_head, end_head);

  const Stages<T, kD, kN, kOwner, Compared::kRowStats> stages{owned, first_owned, chunks};
  const auto add_tile = [&](const auto& step, auto& scores, int stage) {
    uint32_t alive = 0;
    finish_scores<kN, kOwner, kGeneral, Compared::kInLog2>(a, pair, step.head, first_owned, step.first_visited,
                                                           owned_real, Real<kN>(step.visited(), step.first_visited),
                                                           scores, &alive);
    const float share =
        load_global(a.grad_sums + pair * a.heads + step.head) / upstream * gradient_range<T, Compared>();
    if (Compared::kMayBeInfinite && share == 0) return;  // for 0 times infinity would be NaN
    const auto make_slopes = [&](auto of_second) {
      constexpr bool kOfSecond = decltype(of_second)::value;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float score[2] = {scores[0][n][e], scores[1][n][e]};
          const auto stat = [&](int k, int v) {
            return kQueries
                       ? row_stats[k][v][e / 2]
                       : load_shared<float>(stages.stats(stage) + ((2 * k + v) * kN + n * 8 + visited_of_lane(e)) * 4);
          };
          float slope[2];
          Compared::template slopes<kOfSecond>(share, score, stat, slope);
#pragma unroll
          for (int v = 0; v < (kOfSecond ? 2 : 1); ++v)
            scores[v][n][e] = kGeneral && score[v] == -infinity() ? 0.0f : slope[v];
        }
    };
    if (Compared::kSharesSlopes || wanted[1]) {
      make_slopes(std::true_type{});
    } else {
      make_slopes(std::false_type{});
    }
    const auto add = [&](int v) {
      Products<T>::template add_weighted<kD, kN>(scores[v], stages.visited(stage) + v * SharedVectors<T, kD>::bytes(kN),
                                                 gradient[v]);
    };
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (wanted[v]) add(v);
      if (v == 0) sync_warp();  // both at a time would need more registers than there are
    }
  };
  if (Real<kOwned>(owned, first_owned).any())
    for_tiles<true>(stages, Steps<kN, kOwner>(a, pair, first_owned, first_head, end_head, chunks, own_chunk), add_tile);
  real_owned(owned, first_owned, owned_real);
  const int first_of_warp = first_owned + warp_index() * 16, feature = own_chunk * kD;
  const float factor = Compared::kFactor * a.scale * upstream / gradient_range<T, Compared>();
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    if (!wanted[v]) continue;
    const int64_t heads = kQueries ? a.heads : a.key_heads;
    T* to = static_cast<T*>(pointers[v].gradient) + ((pair * heads + head) * owned.count() + first_of_warp) * a.dim +
            feature;
    char* scratch =
        stages.owned(0) + v * SharedVectors<T, kD>::bytes(kOwned) + SharedVectors<T, kD>::bytes(16) * warp_index();
    write_gradient<T, kD>(gradient[v], factor, owned_real[v], scratch, to, owned.count() - first_of_warp, a.dim,
                          a.dim - feature);
  }
}

EAR_OPS_DEVICE bool wants(const HeadsPointer (&pointers)[2]) { return pointers[0].gradient || pointers[1].gradient; }

// The blocks of threads of one key head make its queries' gradients first, then its keys', so that what they read is at
// hand.
template <typename T, int kD, bool kGeneral, typename Compared>
EAR_OPS_KERNEL(kThreads, 1)
backward(EAR_OPS_ARGUMENT const QKArgs a) {
  const int chunks = (a.dim + kD - 1) / kD, group = a.heads / a.key_heads;
  const int query_blocks = (a.queries + kOwned - 1) / kOwned, key_blocks = (a.keys + kOwned - 1) / kOwned;
  const int of_queries = wants(a.query) ? group * query_blocks * chunks : 0;
  const int per_head = of_queries + (wants(a.key) ? key_blocks * chunks : 0);
  const int block = static_cast<int>(block_index());
  int index = block % per_head;
  const int key_head = block / per_head % a.key_heads;
  const int64_t pair = block / per_head / a.key_heads;
  if (index < of_queries) {
    const int head = key_head * group + index / chunks / query_blocks;
    gradient_block<T, kD, kGeneral, Compared, Role::kQueries>(a, pair, head, index / chunks % query_blocks,
                                                              index % chunks);
  } else {
    index -= of_queries;
    gradient_block<T, kD, kGeneral, Compared, Role::kKeys>(a, pair, key_head, index / chunks, index % chunks);
  }
}

}  // namespace ear_ops::cuda
