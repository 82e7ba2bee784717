// sum (P - T)^2, in one sweep. With r = sum P^ / sum T^ and D^ = P^ - r T^ a row sums D^ D^, D^ P^, D^ T^ and T^ T^.
// Where the softmax of the whole row is P = a P^ and T = b T^, all else follows:
//
//   P - T           = a D^ + c T^ with c = a r - b, which is near 0 where the row's own ratio is near r
//   sum (P - T)^2   = a^2 sum D^ D^ + 2 a c sum D^ T^ + c^2 sum T^ T^
//   sum T (P - T)   = b (a sum D^ T^ + c sum T^ T^)
//   sum P (P - T)   = a (a sum D^ P^ + c sum P^ T^), where sum P^ T^ = sum D^ T^ + r sum T^ T^
//
// (P - T)^2 is never expanded into its three products, whose difference would lose the digits of close views.
// sum D^ P^ could be had of the others, but would lose those of a row in which one key has all of P.
#pragma once

#include "../score_loops.h"

namespace {

template <typename A>
struct Mse {
  using Scalar = A;
  using V = typename Vec<A>::type;
  static constexpr bool kTwoSweeps = false;
  enum Sum { kRatio, kSquares, kWithFirst, kWithSecond, kTargets };

  static void start(RunningRows<A>* rows) {
    start_rows(rows);
    for (int64_t lane = 0; lane < kLanes; ++lane) rows->of_comparison[kRatio][lane] = 1;
  }

  template <bool kMasked>
  static void add(const LaneGroup<A>& c, RunningRows<A>* rows) {
    A(*sums)[kLanes] = rows->of_comparison;
    for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
      V factor[2], sum[2];
      for (int view = 0; view < 2; ++view) {
        factor[view] = add_exponentials<A, kMasked, true>(c, view, lane, rows->max[view], rows->sum[view]);
        sum[view] = vload<A>(rows->sum[view] + lane);
      }
      const V before = vload<A>(sums[kRatio] + lane), ratio = sum[1] == V{} ? vset<A>(1) : sum[0] / sum[1];
      const V step = factor[0] * before - factor[1] * ratio;  // D^ becomes factor[0] D^ + step T^
      V squares = vload<A>(sums[kSquares] + lane), targets = vload<A>(sums[kTargets] + lane);
      V with_first = vload<A>(sums[kWithFirst] + lane), with_second = vload<A>(sums[kWithSecond] + lane);
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
      vstore<A>(sums[kRatio] + lane, ratio);
      vstore<A>(sums[kSquares] + lane, squares);
      vstore<A>(sums[kWithFirst] + lane, with_first);
      vstore<A>(sums[kWithSecond] + lane, with_second);
      vstore<A>(sums[kTargets] + lane, targets);
    }
  }

  // The statistics of the comparison are sum P (P - T) and sum T (T - P), of the very P and T that the rounded inverses
  // give, as gradients take them: so its sums are put together in double.
  static A finish(const A* alive, const RunningRows<A>& rows, LaneStats<A>* stats) {
    const A(*sums)[kLanes] = rows.of_comparison;
    double total = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int view = 0; view < 2; ++view) finish_softmax(alive, rows, view, lane, stats);
      const double first = stats->inverse[0][lane], second = stats->inverse[1][lane], ratio = sums[kRatio][lane];
      const double rest = first * ratio - second, mixed = sums[kWithSecond][lane], targets = sums[kTargets][lane];
      const double of_targets = first * mixed + rest * targets;  // sum T^ (P - T)
      const double of_first = first * sums[kWithFirst][lane] + rest * (mixed + ratio * targets);
      stats->of_comparison[0][lane] = static_cast<A>(first * of_first);
      stats->of_comparison[1][lane] = static_cast<A>(-second * of_targets);
      total += first * (first * sums[kSquares][lane] + rest * mixed) + rest * of_targets;
    }
    return static_cast<A>(total);
  }

  // 2 P ((P - T) - sum P (P - T)), and the same of T.
  struct Terms {
    A gradient;
    V d, d_aug;

    Terms(const LaneStats<A>& stats, int64_t lane, A upstream)
        : gradient(2 * upstream),
          d(vload<A>(stats.of_comparison[0] + lane)),
          d_aug(vload<A>(stats.of_comparison[1] + lane)) {}
    template <bool kSecond>
    void make(V p, V t, V, V* to, V* to_aug) const {
      const V difference = p - t;
      *to = gradient * p * (difference - d);
      if constexpr (kSecond) *to_aug = gradient * t * (-difference - d_aug);
    }
  };

  template <bool kMasked, bool kSecond>
  static void gradient(const LaneGroup<A>& c, const LaneStats<A>& stats, A upstream) {
    softmax_gradient<Mse, kMasked, kSecond>(c, stats, upstream);
  }
};

}  // namespace
