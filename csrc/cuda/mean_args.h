// The arguments of the kernels that compare the averages over the heads of two views straight from Q and K.
//
// All heads of both views are in an average, so no block of threads can hold what the gradients of all of them need.
// One kernel therefore writes the slopes of the averages for a rectangle of scores, and others pass over these once for
// each head. A rectangle is a strip of queries with all keys, or a strip of keys with all queries. All strips share one
// piece of memory, which is never larger than the inputs in float32, or than one strip of 64. So memory grows with the
// length, and not with its square.
//
//   memory            Q and K of all heads
//     | statistics    of each head and 64 queries, over the tiles of keys
//   row_stats         maximum and 1 / sum of exponentials
//     | average       of each tile of the rectangle, over all heads of both views; values --> block_sums
//   slopes            F of each view; for KL, the logarithms of what they are scaled by
//     | sums          of each head and 64 queries, where a gradient is wanted
//   row_stats         d
//     | gradient      of each head and 64 queries or keys
//   dQ, dK
//
// Products of 64 x 64 scores for each head: two without gradients. With those of queries and keys there are seven, and
// eight where the memory does not hold all slopes at once: strips of keys make them anew.
#pragma once

#include <algorithm>

#include "qk_args.h"

namespace ear_ops::cuda {

constexpr int kMeanStats = 3;  // rows of row_stats: maximum, 1 / sum of exponentials, and d where it is wanted

// In memory [B, planes, rows, columns], of the queries from first_query on and the keys from first_key on.
struct Slopes {
  float* data;
  int planes;  // F of the first view and of the second, and where a comparison needs them the logarithms of each
  int first_query, rows, first_key, columns;  // multiples of kOwned
};

// What the kernels of one view take. Of `view`, the first entries are those of this view.
struct MeanViewArgs {
  QKArgs view;                // row_stats [kMeanStats, B, H, L], without d where no gradient is wanted; key_mask [B, S]
  const float* head_weights;  // [H], which add up to 1; null: the average divides by H
  Slopes slopes;
  int plane;    // of this view
  float range;  // what dS is multiplied by before it is rounded for the product
};

struct MeanArgs {
  QKArgs view[2];  // as above
  const float* head_weights;
  float divisor[2];  // of the sum over the heads
  Slopes slopes;
  float* block_sums;  // [B, blocks of queries, key_parts]; null for strips of keys
  int key_parts;      // blocks of threads that share the keys of 64 queries
};

inline int padded(int length) { return blocks_of(length) * kOwned; }

// How many queries, or keys, a strip of slopes has: all of them if the memory for slopes allows it.
inline int strip_of(const MeanArgs& a, int length, int others) {
  double inputs = 0;  // numbers of a pair
  for (const QKArgs& of : a.view)
    inputs += static_cast<double>(of.dim) * (static_cast<double>(of.heads) * of.queries + 1.0 * of.key_heads * of.keys);
  const double rows = inputs / a.slopes.planes / std::max(padded(others), kOwned);
  return rows >= padded(length) ? padded(length) : std::max(static_cast<int>(rows) / kOwned * kOwned, kOwned);
}
inline int queries_of_strip(const MeanArgs& a) { return strip_of(a, a.view[0].queries, a.view[0].keys); }
inline int keys_of_strip(const MeanArgs& a) { return strip_of(a, a.view[0].keys, a.view[0].queries); }

// Whether the memory for slopes holds all of them, so that one strip is all that there is.
inline bool is_one_strip(const MeanArgs& a) { return queries_of_strip(a) >= padded(a.view[0].queries); }

// Whether strips of keys follow those of queries.
inline bool has_strips_of_keys(const MeanArgs& a) {
  return (a.view[0].key[0].gradient || a.view[1].key[0].gradient) && !is_one_strip(a);
}

// How many numbers the slopes of the largest strip are.
inline int64_t slopes_size(const MeanArgs& a) {
  int64_t largest = int64_t(1) * queries_of_strip(a) * padded(a.view[0].keys);
  if (has_strips_of_keys(a)) largest = std::max(largest, int64_t(1) * keys_of_strip(a) * padded(a.view[0].queries));
  return a.view[0].pairs * a.slopes.planes * largest;
}

inline int slope_planes(Comparison comparison) { return comparison == Comparison::kKl ? 4 : 2; }

// Null, or what went wrong. Writes row_stats, block_sums and the gradients that are not null, for an upstream gradient
// of 1.
const char* launch_mean_heads(Comparison comparison, Element element, const MeanArgs& args, void* stream);

}  // namespace ear_ops::cuda
