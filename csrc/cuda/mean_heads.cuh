// The kernels of the heads of one view, for averages over heads (mean_args.h): the statistics of rows, the sums d, and
// the gradients. Each passes over tiles of scores through the stages of qk_steps.cuh, of one view alone.
#pragma once

#include "mean_args.h"
#include "qk_backward.cuh"

namespace ear_ops::cuda {

EAR_OPS_DEVICE float weight_of(const float* head_weights, int head) {
  return head_weights ? load_global(head_weights + head) : 1.0f;
}

EAR_OPS_DEVICE float row_stat(const QKArgs& view, int k, int64_t pair, int head, int query) {
  return query < view.queries
             ? load_global(view.row_stats + k * stats_step(view) + stats_index(view, pair, head, query))
             : 0.0f;
}

// e_h of a score: its exponential times the factor of the row. A masked key has none, also where the row holds NaN.
EAR_OPS_DEVICE float of_head(float score, float shift, float factor) {
  const float e = product(exp2_fast(score - shift), factor);
  return score == -infinity() ? 0.0f : e;
}

EAR_OPS_DEVICE float* slope_address(const Slopes& s, int64_t pair, int plane, int query, int key) {
  return s.data + ((pair * s.planes + plane) * s.rows + (query - s.first_query)) * s.columns + (key - s.first_key);
}

// 64 queries of a head that a block owns.
template <typename T, int kD>
struct MeanRows {
  const QKArgs& view;
  int64_t pair;
  int head, first;

  EAR_OPS_DEVICE explicit MeanRows(const MeanViewArgs& a) : view(a.view) {
    const int blocks = a.slopes.rows / kOwned, index = static_cast<int>(block_index());
    first = a.slopes.first_query + index % blocks * kOwned;
    head = index / blocks % view.heads;
    pair = index / blocks / view.heads;
  }

  // Calls body(first key, scores) for every tile.
  template <typename Body>
  EAR_OPS_DEVICE void for_keys(uint32_t* alive, const Body& body) const {
    const Vectors<Role::kQueries> queries{view, pair, head};
    if (!Real<kOwned, 1>(queries, first).any()) return;
    const int chunks = (view.dim + kD - 1) / kD;
    const Stages<T, kD, kVisited, Role::kQueries, 0, 1> stages{queries, first, chunks};
    const Steps<kVisited, Role::kQueries, 1> steps(view, pair, first, head, head + 1, chunks, chunks - 1);
    for_tiles<false>(stages, steps, [&](const auto& step, auto& scores, int) {
      finish_scores<kVisited, Role::kQueries, true>(view, pair, head, first, step.first_visited, {},
                                                    Real<kVisited, 1>(step.visited(), step.first_visited), scores,
                                                    alive);
      body(step.first_visited, scores);
    });
  }

  // Writes statistics from row `k` of row_stats on.
  template <int kCount>
  EAR_OPS_DEVICE void write(int k, int half, const float (&stats)[kCount]) const {
    const int query = first + owned_of_lane(half);
    if (thread_index() % 4 != 0 || query >= view.queries) return;
    const bool real = Vectors<Role::kQueries>{view, pair, head}.real(0, query);
    float* to = view.row_stats + k * stats_step(view) + stats_index(view, pair, head, query);
#pragma unroll
    for (int i = 0; i < kCount; ++i, to += stats_step(view)) store_global(to, real ? stats[i] : 0.0f);
  }
};

template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, 1)
mean_statistics(EAR_OPS_ARGUMENT const MeanViewArgs a) {
  const MeanRows<T, kD> rows(a);
  uint32_t alive = 0;
  float maximum[1][2] = {{-infinity(), -infinity()}}, sum[1][2] = {};
  rows.for_keys(&alive, [&](int, auto& scores) { measure_rows<kVisited>(scores, maximum, sum); });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float stats[2] = {shift_of(maximum[0][half]), inverse_of_row(sum[0][half], alive >> half & 1)};
    rows.write(0, half, stats);
  }
}

template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, 1)
mean_sums(EAR_OPS_ARGUMENT const MeanViewArgs a) {
  const MeanRows<T, kD> rows(a);
  const float weight = weight_of(a.head_weights, rows.head);
  uint32_t alive = 0;
  float d[2] = {0, 0}, maximum[2], factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = rows.first + owned_of_lane(half);
    maximum[half] = row_stat(a.view, 0, rows.pair, rows.head, query);
    factor[half] = weight * row_stat(a.view, 1, rows.pair, rows.head, query);
  }
  if (weight != 0)
    rows.for_keys(&alive, [&](int first_key, auto& scores) {
#pragma unroll
      for (int n = 0; n < kVisited / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int query = rows.first + owned_of_lane(e / 2), key = first_key + n * 8 + visited_of_lane(e);
          const float slope = load_global(slope_address(a.slopes, rows.pair, a.plane, query, key));
          float shift = maximum[e / 2];
          if (a.slopes.planes > 2) shift += load_global(slope_address(a.slopes, rows.pair, 2 + a.plane, query, key));
          const float of_key = of_head(scores[0][n][e], shift, factor[e / 2]);
          d[e / 2] += of_key == 0 ? 0.0f : of_key * slope;
        }
    });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float total[1] = {quad_sum(d[half]) / (weight == 0 ? 1.0f : weight)};
    rows.write(2, half, total);
  }
}

// How many vectors of a tile a block visits for a gradient.
template <typename T>
EAR_OPS_CONSTANT int mean_visited() {
  return sizeof(T) == 4 ? 32 : 64;
}

template <typename T, int kD, Role kOwner>
using MeanGradientStages = Stages<T, kD, mean_visited<T>(), kOwner, kMeanStats, 1>;

template <typename T, int kD, Role kOwner>
EAR_OPS_KERNEL(kThreads, 1)
mean_gradient(EAR_OPS_ARGUMENT const MeanViewArgs a) {
  constexpr bool kQueries = kOwner == Role::kQueries;
  constexpr int kN = mean_visited<T>();
  const QKArgs& view = a.view;
  const int chunks = (view.dim + kD - 1) / kD, group = view.heads / view.key_heads;
  const int heads = kQueries ? view.heads : view.key_heads;
  int index = static_cast<int>(block_index());
  const int own_chunk = index % chunks;
  index /= chunks;
  const int blocks = (kQueries ? a.slopes.rows : a.slopes.columns) / kOwned;
  const int first_owned = (kQueries ? a.slopes.first_query : a.slopes.first_key) + index % blocks * kOwned;
  index /= blocks;
  const int head = index % heads;
  const int64_t pair = index / heads;
  const Vectors<kOwner> owned{view, pair, head};
  const int first_head = kQueries ? head : head * group, end_head = kQueries ? head + 1 : first_head + group;

  float gradient[kD / 8][4] = {};
  bool owned_real[1][2] = {};
  if (!kQueries) real_owned(owned, first_owned, owned_real);
  float row_stats[kMeanStats][2];  // of the owned queries
#pragma unroll
  for (int k = 0; k < kMeanStats; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      row_stats[k][half] = kQueries ? row_stat(view, k, pair, head, first_owned + owned_of_lane(half)) : 0.0f;

  const MeanGradientStages<T, kD, kOwner> stages{owned, first_owned, chunks};
  const auto add_tile = [&](const auto& step, auto& scores, int stage) {
    const float weight = weight_of(a.head_weights, step.head);
    if (weight == 0) return;
    uint32_t alive = 0;
    finish_scores<kN, kOwner, true>(view, pair, step.head, first_owned, step.first_visited, owned_real,
                                    Real<kN, 1>(step.visited(), step.first_visited), scores, &alive);
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int visited = n * 8 + visited_of_lane(e);
        const auto stat = [&](int k) {
          return kQueries ? row_stats[k][e / 2] : load_shared<float>(stages.stats(stage) + (k * kN + visited) * 4);
        };
        const int of_owned = first_owned + owned_of_lane(e / 2), of_visited = step.first_visited + visited;
        const int query = kQueries ? of_owned : of_visited, key = kQueries ? of_visited : of_owned;
        const float slope = load_global(slope_address(a.slopes, pair, a.plane, query, key));
        float top = 0, rest = stat(2);
        if (a.slopes.planes > 2) {
          top = load_global(slope_address(a.slopes, pair, 2 + a.plane, query, key));
          rest *= exp2_fast(top);
        }
        const float of_key = of_head(scores[0][n][e], stat(0) + top, weight * stat(1));
        scores[0][n][e] = of_key == 0 ? 0.0f : a.range * of_key * (slope - rest);
      }
    Products<T>::template add_weighted<kD, kN>(scores[0], stages.visited(stage), gradient);
  };
  if (Real<kOwned, 1>(owned, first_owned).any())
    for_tiles<true>(stages, Steps<kN, kOwner, 1>(view, pair, first_owned, first_head, end_head, chunks, own_chunk),
                    add_tile);
  real_owned(owned, first_owned, owned_real);
  const int first_of_warp = first_owned + warp_index() * 16, feature = own_chunk * kD;
  const HeadsPointer& pointer = owned.pointer(0);
  T* to =
      static_cast<T*>(pointer.gradient) + ((pair * heads + head) * owned.count() + first_of_warp) * view.dim + feature;
  write_gradient<T, kD>(gradient, view.scale / a.range, owned_real[0],
                        stages.owned(0) + SharedVectors<T, kD>::bytes(16) * warp_index(), to,
                        owned.count() - first_of_warp, view.dim, view.dim - feature);
}

}  // namespace ear_ops::cuda
