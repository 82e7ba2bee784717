// What the attention of two views is compared by. Each is an operator of its own, with kernels of its own row loops.
#pragma once

#include <cstdint>

namespace ear_ops {

enum class Comparison {
  kMse,     // squared differences of probabilities
  kKl,      // Kullback-Leibler divergence of the second view from the first
  kJs,      // Jensen-Shannon divergence
  kScores,  // squared differences of scores, before the softmax
};

// How many numbers the forward keeps of a query for the backward: of each view the maximum of the scores, 1 / sum of
// exponentials, and one that depends on the comparison. Scores alone need none of them.
constexpr int64_t row_stats_of(Comparison comparison) { return comparison == Comparison::kScores ? 0 : 6; }

}  // namespace ear_ops
