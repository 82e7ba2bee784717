// What the loops over scores share: masks, exponentials, and the gradient of what compares two softmaxes. The files of
// compare/ hold one comparison each. They are compiled once for each instruction set, by kernels_impl.h.
//
// A comparison C has a scalar type and the functions that fill ScoreLoops. start, finish and, where it needs a second
// sweep, add_values are as described there; add<kMasked> is add_tile; gradient<kMasked, kSecond> is gradient_tile.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using ear_ops::cpu::kLanes;
using ear_ops::cpu::kTile;
using ear_ops::cpu::LaneGroup;
using ear_ops::cpu::LaneStats;
using ear_ops::cpu::RunningRows;
using ear_ops::cpu::ScoreLoops;

constexpr int64_t kChunk = 16;  // keys summed in one go: sums of sums lose less than one long sum

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

// Calls body(begin, end) for the chunks of a tile's keys.
template <typename A, typename Body>
inline void for_chunks(const LaneGroup<A>& c, const Body& body) {
  for (int64_t begin = 0; begin < c.keys; begin += kChunk)
    body(begin, begin + kChunk < c.keys ? begin + kChunk : c.keys);
}

// Adds the exponentials of a view's scores under the largest score so far. Returns the factor that takes what was
// summed before to that score. kInPlace: the exponentials replace the scores, which otherwise stay.
template <typename A, bool kMasked, bool kInPlace>
inline typename Vec<A>::type add_exponentials(const LaneGroup<A>& c, int view, int64_t lane, A* max, A* sum) {
  using V = typename Vec<A>::type;
  const V before = vload<A>(max + lane);
  V best = before;
  for (int64_t j = 0; j < c.keys; ++j) {
    const V score = shifted_score<A, kMasked>(c, view, j, lane, V{});
    if constexpr (kMasked && kInPlace) {
      vstore<A>(c.scores[view] + j * c.ld + lane, score);  // masks and bias are not read again
    }
    best = vmax<A>(score, best);
  }
  const V shift = shift_of<A>(best), factor = vexp(before - shift);
  V total = vload<A>(sum + lane) * factor;
  for_chunks(c, [&](int64_t begin, int64_t end) {
    V part{};
    for (int64_t j = begin; j < end; ++j) {
      const V e = vexp(kMasked && kInPlace ? vload<A>(c.scores[view] + j * c.ld + lane) - shift
                                           : shifted_score<A, kMasked>(c, view, j, lane, shift));
      if constexpr (kInPlace) vstore<A>(c.scores[view] + j * c.ld + lane, e);
      part += e;
    }
    total += part;
  });
  vstore<A>(max + lane, best);
  vstore<A>(sum + lane, total);
  return factor;
}

template <typename A>
void start_rows(RunningRows<A>* rows) {
  *rows = {};
  for (int64_t lane = 0; lane < kLanes; ++lane) rows->max[0][lane] = rows->max[1][lane] = -INFINITY;
}

template <typename A>
inline bool is_alive(const A* alive, int view, int64_t lane) {
  return !alive || alive[view * kLanes + lane] != 0;
}

// The largest score of a view in the lane, and 1 / sum. A query with keys whose scores are all -inf gets an infinite
// inverse and with it NaN, as a softmax gives it.
template <typename A>
inline void finish_softmax(const A* alive, const RunningRows<A>& rows, int view, int64_t lane, LaneStats<A>* stats) {
  stats->max[view][lane] = rows.max[view][lane];
  stats->inverse[view][lane] = is_alive(alive, view, lane) ? 1 / rows.sum[view][lane] : A(0);
}

// The gradient of scores that a softmax follows. C::Terms makes those of both views from P, T and the scores of the
// second view minus those of the first, each minus its maximum.
template <typename C, bool kMasked, bool kSecond>
void softmax_gradient(const LaneGroup<typename C::Scalar>& c, const LaneStats<typename C::Scalar>& stats,
                      typename C::Scalar gradient) {
  using A = typename C::Scalar;
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V shift[2] = {shift_of<A>(vload<A>(stats.max[0] + lane)), shift_of<A>(vload<A>(stats.max[1] + lane))};
    const V inverse[2] = {vload<A>(stats.inverse[0] + lane), vload<A>(stats.inverse[1] + lane)};
    const typename C::Terms terms(stats, lane, gradient);
    for (int64_t j = 0; j < c.keys; ++j) {
      const V first = shifted_score<A, kMasked>(c, 0, j, lane, shift[0]);
      const V second = shifted_score<A, kMasked>(c, 1, j, lane, shift[1]);
      const V p = rounded(vexp(first) * inverse[0]), t = rounded(vexp(second) * inverse[1]);  // whatever is wanted
      V to, to_aug{};
      terms.template make<kSecond>(p, t, second - first, &to, &to_aug);
      if constexpr (kMasked) {  // a NaN elsewhere in the row must not reach masked keys
        to = allowed(c, 0, j, lane) ? to : V{};
        if constexpr (kSecond) to_aug = allowed(c, 1, j, lane) ? to_aug : V{};
      }
      vstore<A>(c.scores[0] + j * c.ld + lane, to);
      if constexpr (kSecond) vstore<A>(c.scores[1] + j * c.ld + lane, to_aug);
    }
  }
}

template <typename C, typename A = typename C::Scalar>
void add_tile(const LaneGroup<A>& c, RunningRows<A>* rows) {
  if (is_masked(c)) return C::template add<true>(c, rows);
  C::template add<false>(c, rows);
}

template <typename C, typename A = typename C::Scalar>
A add_values(const LaneGroup<A>& c, LaneStats<A>* stats) {
  return is_masked(c) ? C::template add_values<true>(c, stats) : C::template add_values<false>(c, stats);
}

template <typename C, typename A = typename C::Scalar>
void gradient_tile(const LaneGroup<A>& c, const LaneStats<A>& stats, A gradient, bool wanted) {
  if (is_masked(c))
    return wanted ? C::template gradient<true, true>(c, stats, gradient)
                  : C::template gradient<true, false>(c, stats, gradient);
  wanted ? C::template gradient<false, true>(c, stats, gradient)
         : C::template gradient<false, false>(c, stats, gradient);
}

template <typename C>
constexpr ScoreLoops<typename C::Scalar> score_loops() {
  ScoreLoops<typename C::Scalar> loops = {C::start, add_tile<C>, C::finish, nullptr, gradient_tile<C>};
  if constexpr (C::kTwoSweeps) loops.add_values = add_values<C>;
  return loops;
}

}  // namespace
