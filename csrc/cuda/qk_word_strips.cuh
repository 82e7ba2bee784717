// Strips of words. A strip takes the words that follow the strip before it, as many as have at most strip_tokens tokens
// in each view. A word of more tokens has a strip of its own, which is large. So the tokens of a strip that is not
// large fit one tile.
//
// The first tokens of a strip say where it ends: the word of the token that is strip_tokens further has no room. Every
// block of threads finds the strips by itself, one after the other, from the lists in global memory, so that nothing
// has to know how many there are. Numbers without a token take no room between two strips.
#pragma once

#include "qk_vectors.cuh"
#include "qk_words_args.h"

namespace ear_ops::cuda {

// A number of each view. Registers have no index, so that an array would lie in memory.
struct OfViews {
  int first, second;
  EAR_OPS_DEVICE int operator()(int v) const { return v == 0 ? first : second; }
  EAR_OPS_DEVICE bool operator==(const OfViews& other) const { return first == other.first && second == other.second; }
};

// The lists of tokens of one pair. Where they begin is worked out anew each time, because registers are few.
struct WordLists {
  const WordArgs& a;
  int pair;

  EAR_OPS_DEVICE const int* of_tokens(const int* lists, int v) const {
    return lists + static_cast<int64_t>(unknown(pair)) * a.queries + (v == 0 ? 0 : a.tokens_of_view);
  }
  // Where in the list of a view a number begins.
  EAR_OPS_DEVICE int begin(int v, int number) const {
    const int at = number < a.numbers ? number : a.numbers;
    return load_global(a.first + static_cast<int64_t>(unknown(pair)) * (a.numbers + 1) +
                       (v == 0 ? 0 : a.firsts_of_view) + at);
  }
  EAR_OPS_DEVICE OfViews begins(int number) const { return {begin(0, number), begin(1, number)}; }
  EAR_OPS_DEVICE int pieces(int v, int number) const { return begin(v, number + 1) - begin(v, number); }
  // Whether a number is a word of both views, which has a row in M.
  EAR_OPS_DEVICE bool has_row(int number) const {
    const bool exists[2] = {pieces(0, number) > 0, pieces(1, number) > 0};
    return number > 0 && exists[0] && exists[1];
  }

  EAR_OPS_DEVICE int position(int v, int index) const { return load_global(of_tokens(a.position, v) + index); }
  EAR_OPS_DEVICE int number(int v, int index) const { return load_global(of_tokens(a.number, v) + index); }
  // The same, or a number that no token has where the list has ended.
  EAR_OPS_DEVICE int number_or_end(int v, int index) const { return index < a.queries ? number(v, index) : a.numbers; }
};

// The words [number, number + words), whose tokens are [from, to) of each list.
struct alignas(16) Strip {
  OfViews from, to;
  int number, words;
  int has_rows;  // whether a word may have a row in M: both views have tokens with a word

  // The strip whose first tokens are `from` of each list.
  EAR_OPS_DEVICE Strip() {}  // for what comes out of shared memory
  EAR_OPS_DEVICE Strip(const WordLists& lists, const OfViews& from) : from(from) {
    const int most = lists.a.strip_tokens;
    number = smaller(lists.number_or_end(0, from.first), lists.number_or_end(1, from.second));
    int end = smaller(lists.number_or_end(0, from.first + most), lists.number_or_end(1, from.second + most));
    end = smaller(end, number + most);
    if (end == number) ++end;  // a large word
    words = end - number;
    to = lists.begins(end);
    const OfViews worded = lists.begins(1);
    has_rows = to.first > from.first && to.second > from.second && to.first > worded.first && to.second > worded.second;
  }
  static EAR_OPS_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
  // Whether there is a strip, or the lists have ended.
  EAR_OPS_DEVICE bool exists(const WordArgs& a) const { return from.first < a.queries || from.second < a.queries; }
  // Its tokens in the view that has more of them, whether they need several tiles, and how many.
  EAR_OPS_DEVICE int tokens() const {
    const int first = to.first - from.first, second = to.second - from.second;
    return first > second ? first : second;
  }
  EAR_OPS_DEVICE bool is_large(int most) const { return tokens() > most; }
  EAR_OPS_DEVICE int tiles(int most) const { return is_large(most) ? (tokens() + most - 1) / most : 1; }
};

}  // namespace ear_ops::cuda
