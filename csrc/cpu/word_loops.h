// The loops of attention between words: sums over the keys of a word, and their gradient. kernels_impl.h includes this,
// so that it is compiled once for each instruction set.
#pragma once

#include "score_loops.h"

namespace {

using ear_ops::cpu::WordRows;

template <typename A, bool kMasked>
void add_words_of(const LaneGroup<A>& c, const int32_t* word, int64_t words, WordRows<A>* rows, A* sums) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V before = vload<A>(rows->max + lane), summed = vload<A>(rows->sum + lane);
    V best = before, alive = kMasked ? vload<A>(rows->alive + lane) : vset<A>(1);
    for (int64_t j = 0; j < c.keys; ++j) {
      const V score = shifted_score<A, kMasked>(c, 0, j, lane, V{});
      if constexpr (kMasked) {  // masks and bias are not read again
        vstore<A>(c.scores[0] + j * c.ld + lane, score);
        alive = allowed(c, 0, j, lane) ? vset<A>(1) : alive;
      }
      best = vmax<A>(score, best);
    }
    const V shift = shift_of<A>(best), factor = vexp(before - shift);
    bool moved = false;
    for (int64_t l = 0; l < Vec<A>::lanes; ++l) moved |= summed[l] != 0 && factor[l] != 1;
    for (int64_t w = 0; moved && w < words; ++w)
      vstore<A>(sums + w * c.ld + lane, factor * vload<A>(sums + w * c.ld + lane));
    V total = factor * summed;
    for_chunks(c, [&](int64_t begin, int64_t end) {
      V part{};
      for (int64_t j = begin; j < end; ++j) {
        const V e = vexp(kMasked ? vload<A>(c.scores[0] + j * c.ld + lane) - shift
                                 : shifted_score<A, false>(c, 0, j, lane, shift));
        A* to = sums + word[j] * c.ld + lane;
        vstore<A>(to, vload<A>(to) + e);
        part += e;
      }
      total += part;
    });
    vstore<A>(rows->max + lane, best);
    vstore<A>(rows->sum + lane, total);
    vstore<A>(rows->alive + lane, alive);
  }
}

template <typename A>
void add_words(const LaneGroup<A>& c, const int32_t* word, int64_t words, WordRows<A>* rows, A* sums) {
  if (is_masked(c)) return add_words_of<A, true>(c, word, words, rows, sums);
  add_words_of<A, false>(c, word, words, rows, sums);
}

template <typename A, bool kMasked>
void word_exponentials_of(const LaneGroup<A>& c, const int32_t* word, const A* max, A* sums) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V shift = shift_of<A>(vload<A>(max + lane));
    for (int64_t j = 0; j < c.keys; ++j) {
      const V e = vexp(shifted_score<A, kMasked>(c, 0, j, lane, shift));
      vstore<A>(c.scores[0] + j * c.ld + lane, e);
      if (!sums) continue;
      A* to = sums + word[j] * c.ld + lane;
      vstore<A>(to, vload<A>(to) + e);
    }
  }
}

template <typename A>
void word_exponentials(const LaneGroup<A>& c, const int32_t* word, const A* max, A* sums) {
  if (is_masked(c)) return word_exponentials_of<A, true>(c, word, max, sums);
  word_exponentials_of<A, false>(c, word, max, sums);
}

template <typename A, bool kMasked>
void word_gradient_of(const LaneGroup<A>& c, const int32_t* word, const A* gradients, const A* d) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V mean = vload<A>(d + lane);
    for (int64_t j = 0; j < c.keys; ++j) {
      A* at = c.scores[0] + j * c.ld + lane;
      V to = vload<A>(at) * (vload<A>(gradients + word[j] * c.ld + lane) - mean);
      if constexpr (kMasked) to = allowed(c, 0, j, lane) ? to : V{};  // a NaN elsewhere in the row must not reach it
      vstore<A>(at, to);
    }
  }
}

template <typename A>
void word_gradient(const LaneGroup<A>& c, const int32_t* word, const A* gradients, const A* d) {
  if (is_masked(c)) return word_gradient_of<A, true>(c, word, gradients, d);
  word_gradient_of<A, false>(c, word, gradients, d);
}

template <typename A>
void word_dots(const A* gradients, const A* sums, int64_t words, int64_t ld, const A* factor, A* d) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    V total{};
    for (int64_t begin = 0; begin < words; begin += kChunk) {
      V part{};
      for (int64_t w = begin; w < words && w < begin + kChunk; ++w)
        part += vload<A>(gradients + w * ld + lane) * vload<A>(sums + w * ld + lane);
      total += part;
    }
    vstore<A>(d + lane, total * vload<A>(factor + lane));
  }
}

template <typename A>
void add_to_rows(const A* src, int64_t rows, int64_t n, const int32_t* to, const A* factor, A* dst) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += Vec<A>::lanes) {
      A* at = dst + to[i] * n + j;
      vstore<A>(at, vload<A>(at) + factor[i] * vload<A>(src + i * n + j));
    }
}

template <typename A>
void copy_from_rows(const A* src, int64_t rows, int64_t n, const int32_t* from, const A* factor, A* dst) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; j += Vec<A>::lanes)
      vstore<A>(dst + i * n + j, factor[i] * vload<A>(src + from[i] * n + j));
}

}  // namespace
