// The loops over scores: softmax, the comparison of the views, and the gradient. kernels_impl.h includes this, so that
// it is compiled once for each instruction set.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using ear_ops::cpu::kLanes;
using ear_ops::cpu::LaneGroup;
using ear_ops::cpu::LaneStats;
using ear_ops::cpu::RunningRows;

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

template <typename A>
void start_rows(RunningRows<A>* rows) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    for (int view = 0; view < 2; ++view) rows->max[view][lane] = -INFINITY, rows->sum[view][lane] = 0;
    rows->ratio[lane] = 1;
    rows->squares[lane] = rows->with_first[lane] = rows->with_second[lane] = rows->targets[lane] = 0;
  }
}

// Calls body(begin, end) for the chunks of a tile's keys.
template <typename A, typename Body>
inline void for_chunks(const LaneGroup<A>& c, const Body& body) {
  for (int64_t begin = 0; begin < c.keys; begin += kChunk)
    body(begin, begin + kChunk < c.keys ? begin + kChunk : c.keys);
}

// Turns the scores of a view into exponentials under the largest score so far. Returns the factor that takes what was
// summed before to that score.
template <typename A, bool kMasked>
inline typename Vec<A>::type add_exponentials(const LaneGroup<A>& c, int view, int64_t lane, A* max, A* sum) {
  using V = typename Vec<A>::type;
  const V before = vload<A>(max + lane);
  V best = before;
  for (int64_t j = 0; j < c.keys; ++j) {
    const V score = shifted_score<A, kMasked>(c, view, j, lane, V{});
    if constexpr (kMasked) vstore<A>(c.scores[view] + j * c.ld + lane, score);  // masks and bias are not read again
    best = vmax<A>(score, best);
  }
  const V shift = shift_of<A>(best), factor = vexp(before - shift);
  V total = vload<A>(sum + lane) * factor;
  for_chunks(c, [&](int64_t begin, int64_t end) {
    V part{};
    for (int64_t j = begin; j < end; ++j) {
      const V e = vexp(kMasked ? vload<A>(c.scores[view] + j * c.ld + lane) - shift
                               : shifted_score<A, false>(c, view, j, lane, shift));
      vstore<A>(c.scores[view] + j * c.ld + lane, e);
      part += e;
    }
    total += part;
  });
  vstore<A>(max + lane, best);
  vstore<A>(sum + lane, total);
  return factor;
}

template <typename A, bool kMasked>
void add_tile_of(const LaneGroup<A>& c, RunningRows<A>* rows) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    V factor[2], sum[2];
    for (int view = 0; view < 2; ++view) {
      factor[view] = add_exponentials<A, kMasked>(c, view, lane, rows->max[view], rows->sum[view]);
      sum[view] = vload<A>(rows->sum[view] + lane);
    }
    const V before = vload<A>(rows->ratio + lane), ratio = sum[1] == V{} ? vset<A>(1) : sum[0] / sum[1];
    const V step = factor[0] * before - factor[1] * ratio;  // D^ becomes factor[0] D^ + step T^
    V squares = vload<A>(rows->squares + lane), targets = vload<A>(rows->targets + lane);
    V with_first = vload<A>(rows->with_first + lane), with_second = vload<A>(rows->with_second + lane);
    squares =
        factor[0] * (factor[0] * squares + step * with_second) + step * (factor[0] * with_second + step * targets);
    with_first = factor[0] * (factor[0] * with_first + step * (with_second + before * targets));
    with_second = factor[1] * (factor[0] * with_second + step * targets);
    targets *= factor[1] * factor[1];
    for_chunks(c, [&](int64_t begin, int64_t end) {
      V squares_part{}, with_first_part{}, with_second_part{}, targets_part{};
      for (int64_t j = begin; j < end; ++j) {
        const V first = vload<A>(c.scores[0] + j * c.ld + lane), second = vload<A>(c.scores[1] + j * c.ld + lane);
        const V difference = first - ratio * second;
        squares_part += difference * difference;
        with_first_part += difference * first;
        with_second_part += difference * second;
        targets_part += second * second;
      }
      squares += squares_part, targets += targets_part;
      with_first += with_first_part, with_second += with_second_part;
    });
    vstore<A>(rows->ratio + lane, ratio);
    vstore<A>(rows->squares + lane, squares);
    vstore<A>(rows->with_first + lane, with_first);
    vstore<A>(rows->with_second + lane, with_second);
    vstore<A>(rows->targets + lane, targets);
  }
}

template <typename A>
void add_tile(const LaneGroup<A>& c, RunningRows<A>* rows) {
  if (is_masked(c)) return add_tile_of<A, true>(c, rows);
  add_tile_of<A, false>(c, rows);
}

// A query with keys whose scores are all -inf gets an infinite inverse and with it NaN, as a softmax gives it. d is of
// the very P and T that the rounded inverses give, as gradients take them: so its sums are put together in double.
template <typename A>
A finish_rows(const A* alive, const RunningRows<A>& rows, LaneStats<A>* stats) {
  double total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    double inverse[2];
    for (int view = 0; view < 2; ++view) {
      const A rounded_inverse = alive && alive[view * kLanes + lane] == 0 ? A(0) : 1 / rows.sum[view][lane];
      stats->max[view][lane] = rows.max[view][lane];
      inverse[view] = stats->inverse[view][lane] = rounded_inverse;
    }
    const double first = inverse[0], ratio = rows.ratio[lane], rest = first * ratio - inverse[1];
    const double mixed = rows.with_second[lane], targets = rows.targets[lane];
    const double of_targets = first * mixed + rest * targets;  // sum T^ (P - T)
    const double of_first = first * rows.with_first[lane] + rest * (mixed + ratio * targets);
    stats->d[0][lane] = static_cast<A>(first * of_first);
    stats->d[1][lane] = static_cast<A>(-inverse[1] * of_targets);
    total += first * (first * rows.squares[lane] + rest * mixed) + rest * of_targets;
  }
  return static_cast<A>(total);
}

template <typename A, bool kMasked>
void gradient_tile_of(const LaneGroup<A>& c, const LaneStats<A>& stats, A gradient) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V shift[2] = {shift_of<A>(vload<A>(stats.max[0] + lane)), shift_of<A>(vload<A>(stats.max[1] + lane))};
    const V inverse[2] = {vload<A>(stats.inverse[0] + lane), vload<A>(stats.inverse[1] + lane)};
    const V d = vload<A>(stats.d[0] + lane), d_aug = vload<A>(stats.d[1] + lane);
    for (int64_t j = 0; j < c.keys; ++j) {
      const V p = vexp(shifted_score<A, kMasked>(c, 0, j, lane, shift[0])) * inverse[0];
      const V t = vexp(shifted_score<A, kMasked>(c, 1, j, lane, shift[1])) * inverse[1];
      const V difference = p - t;
      V to = gradient * p * (difference - d), to_aug = gradient * t * (-difference - d_aug);
      if constexpr (kMasked) {  // a NaN elsewhere in the row must not reach masked keys
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
  if (is_masked(c)) return gradient_tile_of<A, true>(c, stats, gradient);
  gradient_tile_of<A, false>(c, stats, gradient);
}
}  // namespace
