// The arguments of the kernels that compare attention between words.
#pragma once

#include "qk_args.h"

namespace ear_ops::cuda {

// Every word has the number 1 + its id. A token without a word has the number 0; padding has none. The tokens of a view
// lie in lists, in the order of their numbers; what padding there is comes first.
struct WordArgs : QKArgs {  // row_stats [4, B, H, L]: maximum, 1 / sum of exponentials; block_sums [B, H, strip_blocks]
  Comparison comparison;
  int numbers;          // every number is less
  const int* position;  // [2B, L] of each token of a list
  const int* number;    // [2B, L] of each token of a list
  const int* first;     // [2B, numbers + 1] where in its list each number begins, and where the list ends
  float* d;             // [2, B, H, L] of the rows that the backward makes, by positions
  int64_t tokens_of_view, firsts_of_view;  // elements of these lists that one view has, which the launch sets
  int strip_tokens;  // tokens of a tile, which the launch sets: 64, or fewer where shared memory is small
};

// How many blocks of threads share the strips of one head. A block takes every so many strips (qk_word_strips.cuh).
inline int strip_blocks(const WordArgs& a) { return blocks_of(a.queries); }

// Null, or what went wrong. The forward writes row_stats and block_sums; the backward d, and the gradients that are not
// null.
const char* launch_words_forward(Element element, const WordArgs& args, void* stream);
const char* launch_words_backward(Element element, const WordArgs& args, void* stream);

}  // namespace ear_ops::cuda
