// The arguments of the kernels that compare attention between words.
#pragma once

#include "qk_args.h"

namespace ear_ops::cuda {

constexpr int kStripWords = 32;  // words of a strip

// Every word has the number 1 + its id. A token without a word has the number 0; padding has none. The tokens of a view
// lie in lists, in the order of their numbers; what padding there is comes first.
struct WordArgs : QKArgs {  // row_stats [4, B, H, L]: maximum, 1 / sum of exponentials; block_sums [B, H, strips]
  Comparison comparison;
  int numbers;          // every number is less
  const int* position;  // [2B, L] of each token of a list
  const int* number;    // [2B, L] of each token of a list
  const int* first;     // [2B, numbers + 1] where in its list each number begins, and where the list ends
  float* d;             // [2, B, H, L] of the rows that the backward makes, by positions
};

inline int strips_of(const WordArgs& a) { return (a.numbers + kStripWords - 1) / kStripWords; }

// Null, or what went wrong. The forward writes row_stats and block_sums; the backward d, and the gradients that are not
// null.
const char* launch_words_forward(Element element, const WordArgs& args, void* stream);
const char* launch_words_backward(Element element, const WordArgs& args, void* stream);

}  // namespace ear_ops::cuda
