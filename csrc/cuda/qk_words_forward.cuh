// The loss of the words of a strip, and the softmax' statistics of their tokens. A block of threads owns 32 words of
// one head, and visits the words of all strips.
//
//   registers   scores of 64 queries and all keys, tile by tile --> maximum and sum of exponentials
//   written     row_stats [4, B, H, L]; 0 for tokens that are not compared
//   registers   M of 32 x 32 words (qk_words.cuh) --> values of its entries, strip by strip
//   written     block_sums: one number
#pragma once

#include "block.cuh"
#include "qk_words.cuh"

namespace ear_ops::cuda {

// The running softmax of the two rows of a lane.
struct RunningSoftmax {
  float maximum[2] = {-infinity(), -infinity()}, sum[2] = {0, 0}, compares[2] = {0, 0};

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
      if (compared & 0x33333333u << 2 * half) compares[half] = 1;
    }
  }
  // Puts the parts of the four lanes of a row together: its maximum, and 1 / sum of exponentials.
  EAR_OPS_DEVICE void finish(int half, float (&stats)[2]) const {
    stats[0] = shift_of(quad_max(maximum[half]));
    const float total = quad_sum(sum[half] * exponential(maximum[half], stats[0]));
    stats[1] = inverse_of_row(total, quad_max(compares[half]) != 0);
  }
};

template <typename Block>
EAR_OPS_DEVICE void store_stat(const Block& block, int k, int v, int index, float stat) {
  float* to = block.a.row_stats + stats_index(block.a, block.pair, block.head, block.position(v, index));
  store_global(to + (2 * k + v) * stats_step(block.a), stat);
}

template <typename Block>
EAR_OPS_DEVICE void store_stats(const Block& block, int v, int index, const float (&stats)[2]) {
#pragma unroll
  for (int k = 0; k < 2; ++k) store_stat(block, k, v, index, stats[k]);
}

// Writes the statistics of the queries of a strip; the first one's block writes those of all tokens without a word.
template <typename Block>
EAR_OPS_DEVICE void write_stats(Block& block, int strip) {
  const float none[2] = {0, 0};
#pragma unroll 1
  for (int v = 0; v < 2; ++v) {
    const int end = block.end(v, strip);
    if (strip == 0)
      for (int i = thread_index(); i < block.first_query(v, 0); i += kThreads) store_stats(block, v, i, none);
#pragma unroll 1
    for (int query = block.first_query(v, strip); query < end; query += kOwned) {
      RunningSoftmax rows;
#pragma unroll 1
      for (int key = block.begin(v, 0); key < block.a.keys; key += kOwned) {
        float scores[kOwned / 8][4];
        const uint32_t compared = block.score(v, {query, end, key, block.a.keys}, block.chunks - 1, scores);
        rows.add(scores, compared);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float stats[2];
        rows.finish(half, stats);
        const int index = query + owned_of_lane(half);
        if (thread_index() % 4 == 0 && index < end) store_stats(block, v, index, stats);
      }
    }
  }
}

template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, 1)
words_forward(EAR_OPS_ARGUMENT const WordArgs a) {
  const WordStrip at(a);
  WordBlock<T, kD, Role::kQueries> block(a, at.pair, at.head, 0);
  write_stats(block, at.strip);
  block.known = 2;  // behind the barrier with which a visit begins
  block.forget();
  float values[kWordsOfWarp] = {};
  uint32_t has_target = 0;
  if (block.has_queries(at.strip))
#pragma unroll 1
    for (int j = 0; j < at.strips; ++j) {
      if (!block.has_keys(j)) continue;
      block.template visit<0>(at.strip, j, 0, 0, 0, 0);  // makes sums alone
      block.for_entries(at.strip, [&](auto maps, int number, const float (&m)[2], bool, const float (&)[2]) {
        const float value = maps.value(m[0], m[1]);
#pragma unroll
        for (int n = 0; n < kWordsOfWarp; ++n)
          if (n == number) values[n] += value;
        if (m[1] != 0) has_target |= 1u << number;
      });
    }
  float total = 0;
#pragma unroll
  for (int n = 0; n < kWordsOfWarp; ++n) {
    const bool counts = ballot(has_target >> n & 1) != 0 || a.comparison != Comparison::kKl;
    const int row = block.row_of_warp(at.strip, n);
    if (counts) total += values[n];
    if (counts || !block.has_row(row)) continue;
    // A row in which T is 0 everywhere counts nothing, and has no gradient: as if its tokens attended to nothing. The
    // maxima stay, for exponentials that are multiplied by 0.
#pragma unroll 1
    for (int v = 0; v < 2; ++v)
      for (int i = block.begin(v, row) + thread_index() % kWarp; i < block.begin(v, row + 1); i += kWarp)
        store_stat(block, 1, v, i, 0);
  }
  total = block_sum<kThreads>(total);
  const int64_t index = (at.pair * a.heads + at.head) * at.strips + at.strip;
  if (thread_index() == 0) store_global(a.block_sums + index, total);
}

}  // namespace ear_ops::cuda
