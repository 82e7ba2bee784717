// The loss of the words of a strip, and the softmax' statistics of their tokens. A block of threads takes strips of
// words of one head, and visits the words of all strips for each.
//
//   registers   scores of a tile of queries and all keys, tile by tile --> maximum and sum of exponentials
//   written     row_stats [4, B, H, L]; 0 for tokens that are not compared
//   memory      M of two strips (qk_words.cuh) --> values of its entries, strip by strip
//   written     block_sums: one number
#pragma once

#include "block.cuh"
#include "qk_words.cuh"

namespace ear_ops::cuda {

// The running softmax of the two rows of a lane.
struct RunningSoftmax {
  float maximum[2] = {-infinity(), -infinity()}, sum[2] = {0, 0};
  uint32_t compares = 0;  // a bit for each row

  EAR_OPS_DEVICE void add(const float (&scores)[kOwned / 8][4], uint32_t compared) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = maximum[half], total = 0;
#pragma unroll
      for (int n = 0; n < kOwned / 8; ++n)
        largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      const float shift = shift_of(largest);
#pragma unroll
      for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) total += exponential(scores[n][e], shift);
      sum[half] = sum[half] * exponential(maximum[half], shift) + total;
      maximum[half] = largest;
    }
    compares |= compared;
  }
  // Puts the parts of the four lanes of a row together: its maximum, and 1 / sum of exponentials.
  EAR_OPS_DEVICE void finish(int half, float (&stats)[2]) const {
    stats[0] = shift_of(quad_max(maximum[half]));
    const float total = quad_sum(sum[half] * exponential(maximum[half], stats[0]));
    stats[1] = inverse_of_row(total, quad_max(compares >> half & 1 ? 1.0f : 0.0f) != 0);
  }
};

template <typename Block>
EAR_OPS_DEVICE void store_stat(const Block& block, int k, int v, int index, float stat) {
  float* to = block.a.row_stats + stats_index(block.a, block.lists.pair, block.head, block.lists.position(v, index));
  store_global(to + (2 * k + v) * stats_step(block.a), stat);
}

template <typename Block>
EAR_OPS_DEVICE void store_stats(const Block& block, int v, int index, const float (&stats)[2]) {
#pragma unroll
  for (int k = 0; k < 2; ++k) store_stat(block, k, v, index, stats[k]);
}

// Writes the statistics of the padding of both views.
template <typename Block>
EAR_OPS_DEVICE void write_padding(const Block& block) {
  const float none[2] = {0, 0};
#pragma unroll 1
  for (int v = 0; v < 2; ++v)
    for (int i = thread_index(); i < block.lists.begin(v, 0); i += kThreads) store_stats(block, v, i, none);
}

// Writes the statistics of the queries of the own strip. They attend to all keys that are no padding, in tiles of 64.
template <typename Block>
EAR_OPS_DEVICE void write_stats(Block& block) {
  const WordArgs& a = block.a;
  const OfViews first = block.lists.begins(0);
  const int longest = a.queries - Strip::smaller(first.first, first.second);
#pragma unroll 1
  for (int part = 0; part < block.own_tiles(); ++part) {
    WordTile at;
    block.range_of(Which::kOwn, part, &at.query, &at.query_end);
    RunningSoftmax rows[2];
#pragma unroll 1
    for (int key = 0; key < longest; key += kOwned) {
      at.key = {first.first + key, first.second + key}, at.key_end = {a.queries, a.queries};
      float scores[2][kOwned / 8][4];
      block.template multiply<0>(at, block.chunks - 1, scores);
      const uint32_t compared = block.finish(scores);
#pragma unroll
      for (int v = 0; v < 2; ++v) rows[v].add(scores[v], compared >> (2 * v) & 3);
    }
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float stats[2];
        rows[v].finish(half, stats);
        const int token = owned_of_lane(half), index = at.query(v) + token;
        if (thread_index() % 4 != 0 || index >= at.query_end(v)) continue;
        if (block.head_of(Role::kQueries, v, token) < 0) stats[0] = stats[1] = 0;
        store_stats(block, v, index, stats);
      }
  }
}

// The sum over a warp, the same in every lane.
EAR_OPS_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) value += shuffle_xor(value, lanes);
  return value;
}

// Of KL, which sums rows one by one: a row in which T is 0 everywhere counts nothing. It has no gradient either, as if
// its tokens attended to nothing. The maxima stay, for exponentials that are multiplied by 0.
template <typename Block>
EAR_OPS_DEVICE float sum_of_rows(const Block& block) {
  const Strip i = block.strip(Which::kOwn);
  const int row = thread_index();
  if (row >= i.words || row >= kOwned || load_shared<int>(block.row_facts(row)) < 0) return 0;
  if (load_shared<float>(block.row_target(row)) != 0) return load_shared<float>(block.row_value(row));
#pragma unroll 1
  for (int v = 0; v < 2; ++v)
    for (int index = block.lists.begin(v, i.number + row); index < block.lists.begin(v, i.number + row + 1); ++index)
      store_stat(block, 1, v, index, 0);
  return 0;
}

template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, (WordMemory<T, kD>::kBlocks))
words_forward(EAR_OPS_ARGUMENT const WordArgs a) {
  const WordHead at(a);
  WordBlock<T, kD, Role::kQueries, 2> block(a, at.pair, at.head);
  const auto sums_rows = [&] { return a.comparison == Comparison::kKl; };
  float total = 0;
  if (at.block == 0) write_padding(block);
  block.for_own_strips(at.block, at.blocks, [&] {
    block.forget();
    write_stats(block);
    block.forget();  // with a barrier, behind which others read the statistics
    if (!block.strip(Which::kOwn).has_rows) return;
    if (sums_rows() && thread_index() < a.strip_tokens) {
      store_shared(block.row_value(thread_index()), 0.0f);
      store_shared(block.row_target(thread_index()), 0.0f);
    }
    block.for_strips(Which::kOther, [&] {
      const auto with_sums = [&](const StripPair& of) {
        float of_row = 0;
        bool has_target = false;
        block.template for_entries<false>(of, [&](auto maps, int row, int c, const float (&m)[2]) {
          const float value = maps.value(m[0], m[1]);
          if (!sums_rows()) {
            total += value;
            return;
          }
          of_row = c == 0 ? value : of_row + value;
          has_target = c == 0 ? m[1] != 0 : has_target || m[1] != 0;
          if (c == 0) return;
          const float sum = warp_sum(of_row);
          const bool any = ballot(has_target) != 0;
          if (thread_index() % kWarp != 0) return;
          store_shared(block.row_value(row), load_shared<float>(block.row_value(row)) + sum);
          if (any) store_shared(block.row_target(row), 1.0f);
        });
      };
      block.template visit<2>(0, 0, 0, with_sums, 0);
    });
    if (sums_rows()) total += sum_of_rows(block);
  });
  total = block_sum<kThreads>(total);
  const int64_t index = (at.pair * a.heads + at.head) * at.blocks + at.block;
  if (thread_index() == 0) store_global(a.block_sums + index, total);
}

}  // namespace ear_ops::cuda
