// The averages over the heads of a tile, and their slopes (mean_args.h). A block of threads owns 64 queries and passes
// over its part of the keys of a rectangle. For each tile of keys all heads come one after the other, of the first view
// and then of the second:
//
//   global memory   Q of the block, and K of the tile, of the next head
//                     | cp.async
//   shared memory   stage 0: this head   stage 1: the next one
//                     | mma
//   registers       scores of the head --> e_h, summed over the heads; after the last head of a view, its average
//                     | compare, after the last head of all
//   written         slopes of the tile; one value for all tiles of the block
#pragma once

#include "block.cuh"
#include "mean_compare.cuh"
#include "mean_heads.cuh"

namespace ear_ops::cuda {

// Where a block is on its way over the heads of both views, and over the chunks of their features. Heads without weight
// are passed over.
struct HeadSteps {
  const MeanArgs& a;
  int64_t pair;
  int features, view, head, chunk;

  EAR_OPS_DEVICE HeadSteps(const MeanArgs& a, int64_t pair, int features)
      : a(a), pair(pair), features(features), view(0), head(0), chunk(0) {
    find_head();
  }
  EAR_OPS_DEVICE bool done() const { return view == 2; }
  EAR_OPS_DEVICE const QKArgs& args() const { return a.view[view]; }
  EAR_OPS_DEVICE bool is_first_chunk() const { return chunk == 0; }
  EAR_OPS_DEVICE bool is_last_chunk() const { return (chunk + 1) * features >= args().dim; }
  EAR_OPS_DEVICE Vectors<Role::kQueries> queries() const { return {args(), pair, head}; }
  EAR_OPS_DEVICE Vectors<Role::kKeys> keys() const { return {args(), pair, head / (args().heads / args().key_heads)}; }
  EAR_OPS_DEVICE void advance() {
    if (!is_last_chunk()) {
      ++chunk;
      return;
    }
    chunk = 0, ++head;
    find_head();
  }

 private:
  EAR_OPS_DEVICE void find_head() {
    for (; view < 2; ++view, head = 0)
      for (; head < args().heads; ++head)
        if (weight_of(a.head_weights, head) != 0) return;
  }
};

// As Stages of qk_steps.cuh, where the queries change with every step, too.
template <typename Element, int kFeatures, int kVisits>
struct HeadStages {
  using T = Element;
  static constexpr int kD = kFeatures, kN = kVisits, kViews = 1;
  static constexpr Role kOwner = Role::kQueries;
  static constexpr int kOwnedBytes = views_bytes<T, kD, 1>();
  static constexpr int kStageBytes = kOwnedBytes + SharedVectors<T, kD>::bytes(kN);
  static constexpr int64_t kBytes = 2 * kStageBytes;

  int first_query, first_key;

  EAR_OPS_DEVICE char* owned(int stage) const { return shared_memory() + stage * kStageBytes; }
  EAR_OPS_DEVICE char* visited(int stage) const { return owned(stage) + kOwnedBytes; }
  EAR_OPS_DEVICE void fill(int stage, const HeadSteps& step, bool) const {
    copy_vectors<T, kD, kOwned, kThreads, 1>(owned(stage), step.queries(), first_query, step.chunk * kD);
    copy_vectors<T, kD, kN, kThreads, 1>(visited(stage), step.keys(), first_key, step.chunk * kD);
  }
  template <bool kClears>
  EAR_OPS_DEVICE void prepare(int stage, const HeadSteps&, bool) const {
    static_assert(!kClears, "scores of what masks hide are not looked at");
    if constexpr (Products<T>::kSplit) {
      Products<T>::template split<kD, kOwned, kThreads / kWarp>(owned(stage));
      Products<T>::template split<kD, kN, kThreads / kWarp>(visited(stage));
      sync_block();
    }
  }
  template <bool kClears>
  EAR_OPS_DEVICE void fill_own_chunk(int, const HeadSteps&) const {}
};

// The keys of a tile: registers hold the sums of both views beside the scores of a head.
template <typename T>
EAR_OPS_CONSTANT int averaged_keys() {
  return sizeof(T) == 4 ? 32 : 64;
}

template <typename T, int kD, typename Compared>
EAR_OPS_KERNEL(kThreads, 1)
mean_average(EAR_OPS_ARGUMENT const MeanArgs a) {
  constexpr int kN = averaged_keys<T>(), kTops = Compared::kLogarithms ? kN / 8 : 1;
  const Slopes& slopes = a.slopes;
  int index = static_cast<int>(block_index());
  const int part = index % a.key_parts, blocks = slopes.rows / kOwned;
  index /= a.key_parts;
  const int first_query = slopes.first_query + index % blocks * kOwned;
  const int64_t pair = index / blocks;
  const int64_t tiles = slopes.columns / kN;
  const Vectors<Role::kQueries> queries{a.view[0], pair, 0};
  const bool any_query = Real<kOwned, 1>(queries, first_query).any();
  bool real[1][2];
  real_owned(queries, first_query, real);

  float total = 0;
#pragma unroll 1
  for (int64_t tile = tiles * part / a.key_parts; tile < tiles * (part + 1) / a.key_parts; ++tile) {
    const int first_key = slopes.first_key + static_cast<int>(tile) * kN;
    float sum[2][kN / 8][4], top[2][kTops][4];
    clear(sum);
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int n = 0; n < kTops; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) top[v][n][e] = -infinity();
    bool has_target[2] = {false, false};  // whether a head of the second view has a key at all
    int view = 0;
    const auto next_view = [&]() {  // what was summed is that of the first view
      view = 1;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sum[0][n][e] = sum[1][n][e], sum[1][n][e] = 0;
          if (Compared::kLogarithms) top[0][n % kTops][e] = top[1][n % kTops][e], top[1][n % kTops][e] = -infinity();
        }
    };
    bool any_key = false;
#pragma unroll
    for (int v = 0; v < 2; ++v)
      any_key = any_key || Real<kN, 1>(Vectors<Role::kKeys>{a.view[v], pair, 0}, first_key).any();
    if (any_query && any_key && Structure(a.view[0]).allows_any(first_query, kOwned, first_key, kN))
      for_tiles<false>(HeadStages<T, kD, kN>{first_query, first_key}, HeadSteps(a, pair, kD),
                       [&](const HeadSteps& step, auto& scores, int) {
                         if (step.view != view) next_view();
                         uint32_t alive = 0;
                         finish_scores<kN, Role::kQueries, true>(step.args(), pair, step.head, first_query, first_key,
                                                                 {}, Real<kN, 1>(step.keys(), first_key), scores,
                                                                 &alive);
#pragma unroll
                         for (int half = 0; half < 2; ++half) {
                           const int query = first_query + owned_of_lane(half);
                           const float maximum = row_stat(step.args(), 0, pair, step.head, query);
                           const float inverse = row_stat(step.args(), 1, pair, step.head, query);
                           const float factor = weight_of(a.head_weights, step.head) * inverse;
                           if (view == 1 && inverse != 0) has_target[half] = true;
#pragma unroll
                           for (int n = 0; n < kN / 8; ++n)
#pragma unroll
                             for (int e = 2 * half; e < 2 * half + 2; ++e) {
                               float& of_heads = sum[1][n][e];
                               float shift = maximum;
                               if (Compared::kLogarithms) {
                                 float& largest = top[1][n % kTops][e];
                                 const float before = largest;
                                 largest = fmaxf(before, scores[0][n][e] - maximum);
                                 of_heads = product(of_heads, exponential(before, shift_of(largest)));
                                 shift += shift_of(largest);
                               }
                               of_heads += of_head(scores[0][n][e], shift, factor);
                             }
                         }
                       });
    if (view == 0) next_view();
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2;
        const float tops[2] = {top[0][n % kTops][e], top[1][n % kTops][e]};
        float of_both[2] = {sum[0][n][e], sum[1][n][e]};
        const float value = Compared::compare(tops, of_both, a.divisor);
        // KL is 0 in a row in which no head of the target has a key.
        const bool compares = real[0][half] && (!Compared::kLogarithms || has_target[half]);
        if (compares) total += value;
        float* to =
            slope_address(slopes, pair, 0, first_query + owned_of_lane(half), first_key + n * 8 + visited_of_lane(e));
        const int64_t step = static_cast<int64_t>(slopes.rows) * slopes.columns;
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          store_global(to + v * step, compares ? of_both[v] : 0.0f);
          if (Compared::kLogarithms) store_global(to + (2 + v) * step, compares ? shift_of(tops[v]) : 0.0f);
        }
      }
  }
  if (a.block_sums == nullptr) return;
  total = block_sum<kThreads>(total);
  if (thread_index() != 0) return;
  const int64_t block = pair * ((a.view[0].queries + kOwned - 1) / kOwned) + first_query / kOwned;
  store_global(a.block_sums + block * a.key_parts + part, total);
}

}  // namespace ear_ops::cuda
