// The loops over scores: softmax, the comparison of the views, and the gradient. kernels_impl.h includes this, so that
// it is compiled once for each instruction set.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using ear_ops::cpu::kLanes;
using ear_ops::cpu::LaneGroup;
using ear_ops::cpu::LaneStats;

constexpr int64_t kChunk = 64;  // keys summed in one go: sums of sums lose less than one long sum

template <typename A>
inline bool is_masked(const LaneGroup<A>& c) {
  return c.real[0] || c.bias[0] || c.first;
}

// Which of the queries from `lane` on may attend to key j in this view.
template <typename A>
inline auto allowed(const LaneGroup<A>& c, int view, int64_t j, int64_t lane) {
  const auto zero = typename Vec<A>::type{};
  if (c.real[view] && !c.real[view][j]) return zero != zero;
  auto attend = zero == zero;
  if (c.first) {
    const auto key = vset<A>(static_cast<A>(j));
    attend &= (key >= vload<A>(c.first + lane)) & (key < vload<A>(c.last + lane));
  }
  if (c.bias[view]) attend &= vload<A>(c.bias[view] + j * c.ld + lane) != vset<A>(-INFINITY);
  return attend;
}

// score - shift; -inf where the key is masked, whatever its score is. Every pass rounds the score in the same way. So
// no score exceeds the maximum that is subtracted: at 5e9 the rounding error alone is large enough to overflow exp.
template <typename A, bool kMasked>
inline typename Vec<A>::type shifted_score(const LaneGroup<A>& c, int view, int64_t j, int64_t lane,
                                           typename Vec<A>::type shift) {
  auto score = rounded(vload<A>(c.scores[view] + j * c.ld + lane) * c.scale);
  if constexpr (!kMasked) {
    return score - shift;
  } else {
    if (c.bias[view]) score += vload<A>(c.bias[view] + j * c.ld + lane);
    return allowed(c, view, j, lane) ? score - shift : vset<A>(-INFINITY);
  }
}

// What exponentials are taken relative to: the max, or 0 where there was no key yet.
template <typename A>
inline typename Vec<A>::type shift_of(typename Vec<A>::type max) {
  return max == vset<A>(-INFINITY) ? typename Vec<A>::type{} : max;
}

template <typename A, bool kMasked>
inline void softmax_tile_of(const LaneGroup<A>& c, int view, int64_t lane, A* max, A* sum) {
  const auto before = vload<A>(max + lane);
  auto best = before;
  for (int64_t j = 0; j < c.keys; ++j) {
    const auto score = shifted_score<A, kMasked>(c, view, j, lane, typename Vec<A>::type{});
    if constexpr (kMasked) vstore<A>(c.scores[view] + j * c.ld + lane, score);  // masks and bias are not read again
    best = vmax<A>(score, best);
  }
  const auto shift = shift_of<A>(best);
  auto total = vload<A>(sum + lane) * vexp(before - shift);
  for (int64_t begin = 0; begin < c.keys; begin += kChunk) {
    const int64_t end = begin + kChunk < c.keys ? begin + kChunk : c.keys;
    typename Vec<A>::type part{};
    for (int64_t j = begin; j < end; ++j) {
      const auto e = vexp(kMasked ? vload<A>(c.scores[view] + j * c.ld + lane) - shift
                                  : shifted_score<A, false>(c, view, j, lane, shift));
      vstore<A>(c.scores[view] + j * c.ld + lane, e);
      part += e;
    }
    total += part;
  }
  vstore<A>(max + lane, best);
  vstore<A>(sum + lane, total);
}

template <typename A>
void softmax_tile(const LaneGroup<A>& c, LaneStats<A>* stats) {
  for (int view = 0; view < 2; ++view)
    for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
      if (is_masked(c)) {
        softmax_tile_of<A, true>(c, view, lane, stats->max[view], stats->inverse[view]);
      } else {
        softmax_tile_of<A, false>(c, view, lane, stats->max[view], stats->inverse[view]);
      }
    }
}

// A query with keys whose scores are all -inf gets an infinite inverse and with it NaN, as a softmax gives it.
template <typename A>
void finish_softmax(const A* alive, LaneStats<A>* stats) {
  for (int view = 0; view < 2; ++view)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      A& inverse = stats->inverse[view][lane];
      inverse = alive && alive[view * kLanes + lane] == 0 ? A(0) : 1 / inverse;
    }
}

enum class Scores { kRaw, kRawMasked, kExponentials };

template <typename A, Scores kScores>
inline typename Vec<A>::type probability(const LaneGroup<A>& c, int view, int64_t j, int64_t lane,
                                         typename Vec<A>::type shift, typename Vec<A>::type inverse) {
  if constexpr (kScores == Scores::kExponentials) return vload<A>(c.scores[view] + j * c.ld + lane) * inverse;
  return vexp(shifted_score<A, kScores == Scores::kRawMasked>(c, view, j, lane, shift)) * inverse;
}

template <typename A, Scores kScores>
A difference_tile_of(const LaneGroup<A>& c, LaneStats<A>* stats) {
  using V = typename Vec<A>::type;
  V squared{};
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V shift[2] = {shift_of<A>(vload<A>(stats->max[0] + lane)), shift_of<A>(vload<A>(stats->max[1] + lane))};
    const V inverse[2] = {vload<A>(stats->inverse[0] + lane), vload<A>(stats->inverse[1] + lane)};
    V d[2] = {vload<A>(stats->d[0] + lane), vload<A>(stats->d[1] + lane)};
    for (int64_t begin = 0; begin < c.keys; begin += kChunk) {
      const int64_t end = begin + kChunk < c.keys ? begin + kChunk : c.keys;
      V squared_part{}, d_part{}, d_aug_part{};
      for (int64_t j = begin; j < end; ++j) {
        const V p = probability<A, kScores>(c, 0, j, lane, shift[0], inverse[0]);
        const V t = probability<A, kScores>(c, 1, j, lane, shift[1], inverse[1]);
        const V difference = p - t;
        squared_part += difference * difference;
        d_part += p * difference;
        d_aug_part -= t * difference;
      }
      squared += squared_part, d[0] += d_part, d[1] += d_aug_part;
    }
    for (int view = 0; view < 2; ++view) vstore<A>(stats->d[view] + lane, d[view]);
  }
  A total = 0;
  for (int64_t l = 0; l < Vec<A>::lanes; ++l) total += squared[l];
  return total;
}

template <typename A>
A difference_tile(const LaneGroup<A>& c, bool exponentials, LaneStats<A>* stats) {
  if (exponentials) return difference_tile_of<A, Scores::kExponentials>(c, stats);
  if (is_masked(c)) return difference_tile_of<A, Scores::kRawMasked>(c, stats);
  return difference_tile_of<A, Scores::kRaw>(c, stats);
}

template <typename A, Scores kScores>
void gradient_tile_of(const LaneGroup<A>& c, const LaneStats<A>& stats, A gradient) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V shift[2] = {shift_of<A>(vload<A>(stats.max[0] + lane)), shift_of<A>(vload<A>(stats.max[1] + lane))};
    const V inverse[2] = {vload<A>(stats.inverse[0] + lane), vload<A>(stats.inverse[1] + lane)};
    const V d = vload<A>(stats.d[0] + lane), d_aug = vload<A>(stats.d[1] + lane);
    for (int64_t j = 0; j < c.keys; ++j) {
      const V p = probability<A, kScores>(c, 0, j, lane, shift[0], inverse[0]);
      const V t = probability<A, kScores>(c, 1, j, lane, shift[1], inverse[1]);
      const V difference = p - t;
      V to = gradient * p * (difference - d), to_aug = gradient * t * (-difference - d_aug);
      if constexpr (kScores == Scores::kRawMasked) {  // a NaN elsewhere in the row must not reach masked keys
        to = allowed(c, 0, j, lane) ? to : V{};
        to_aug = allowed(c, 1, j, lane) ? to_aug : V{};
      }
      vstore<A>(c.scores[0] + j * c.ld + lane, to);
      vstore<A>(c.scores[1] + j * c.ld + lane, to_aug);
    }
  }
}

template <typename A>
void gradient_tile(const LaneGroup<A>& c, const LaneStats<A>& stats, A gradient) {
  if (is_masked(c)) return gradient_tile_of<A, Scores::kRawMasked>(c, stats, gradient);
  gradient_tile_of<A, Scores::kRaw>(c, stats, gradient);
}
}  // namespace
