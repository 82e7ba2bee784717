// KL(T || P) = sum T x with x = log T - log P, as the sum of T f(x), f(x) = exp(-x) - 1 + x, in one sweep. No entry is
// negative, and the digits of close views are kept; sums of T x and differences of logarithms of sums would lose them.
//
// A row sums A = T^ f(x^) and B = T^ x^ under x^ = (score - max) of the second view, minus that of the first, minus
// log (sum T^ / sum P^). What was summed before is moved to the x^ of now, x^ - e:
//
//   T^ f(x^ - e) = exp(e) T^ f(x^) - (exp(e) - 1) T^ x^ + f(-e) T^
//   T^ (x^ - e)  = T^ x^ - e T^
//
// Every term is small where the views are close. At the end KL = A / sum T^.
#pragma once

#include "../score_loops.h"

namespace {

template <typename A>
inline typename Vec<A>::type vabs(typename Vec<A>::type x) {
  return x < 0 ? -x : x;
}

constexpr double kNear = 0.5;  // f and the like are series below; beyond, their terms do not cancel

// f(x) for |x| below kNear.
template <typename A>
inline typename Vec<A>::type relative_entropy_series(typename Vec<A>::type x) {
  constexpr int kHighest = sizeof(A) == sizeof(double) ? 17 : 9;
  double factorial = 1;
  for (int k = 2; k <= kHighest; ++k) factorial *= k;
  typename Vec<A>::type sum{};
  for (int k = kHighest; k >= 2; --k) {
    sum = sum * -x + static_cast<A>(1 / factorial);
    factorial /= k;
  }
  return sum * x * x;
}

// T f(x), where p = T exp(-x).
template <typename A>
inline typename Vec<A>::type relative_entropy(typename Vec<A>::type p, typename Vec<A>::type t,
                                              typename Vec<A>::type x) {
  using V = typename Vec<A>::type;
  const V near = t * relative_entropy_series<A>(x), far = (p - t) + t * x;
  const V entry = vabs<A>(x) < static_cast<A>(kNear) ? near : far;
  return entry < 0 ? V{} : entry;
}

template <typename A>
struct Kl {
  using Scalar = A;
  using V = typename Vec<A>::type;
  static constexpr bool kTwoSweeps = false;
  enum Sum { kRatio, kLogRatio, kEntropy, kLinear };  // sum T^ / sum P^, its logarithm, A, B

  static void start(RunningRows<A>* rows) {
    start_rows(rows);
    for (int64_t lane = 0; lane < kLanes; ++lane) rows->of_comparison[kRatio][lane] = 1;
  }

  // Leaves P^ and the difference of the shifted scores where the scores were, so that exponentials are taken once. The
  // difference is infinite where one view alone has the key, and 0 where none has it: it stands for the masks then.
  template <bool kMasked>
  static void add(const LaneGroup<A>& c, RunningRows<A>* rows) {
    alignas(64) A targets[kTile * Vec<A>::lanes];  // T^
    A(*sums)[kLanes] = rows->of_comparison;
    const V infinite = vset<A>(INFINITY);
    for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
      V factor[2], sum[2], shift[2], raised[2];
      const V seen = vload<A>(rows->sum[1] + lane);
      for (int view = 0; view < 2; ++view) {
        const V before = vload<A>(rows->max[view] + lane);
        V best = before;
        for (int64_t j = 0; j < c.keys; ++j) best = vmax<A>(shifted_score<A, kMasked>(c, view, j, lane, V{}), best);
        shift[view] = shift_of<A>(best), factor[view] = vexp(before - shift[view]);
        raised[view] = shift[view] - shift_of<A>(before);
        sum[view] = vload<A>(rows->sum[view] + lane) * factor[view];
        vstore<A>(rows->max[view] + lane, best);
      }
      for_chunks(c, [&](int64_t begin, int64_t end) {
        V part{}, part_aug{};
        for (int64_t j = begin; j < end; ++j) {
          const V first = shifted_score<A, kMasked>(c, 0, j, lane, shift[0]);
          const V second = shifted_score<A, kMasked>(c, 1, j, lane, shift[1]);
          const V p = vexp(first), t = vexp(second);
          V difference = second - first;
          if constexpr (kMasked) difference = (first == -infinite) & (second == -infinite) ? V{} : difference;
          vstore<A>(c.scores[0] + j * c.ld + lane, p);
          vstore<A>(c.scores[1] + j * c.ld + lane, difference);
          vstore<A>(targets + j * Vec<A>::lanes, t);
          part += p, part_aug += t;
        }
        sum[0] += part, sum[1] += part_aug;
      });
      for (int view = 0; view < 2; ++view) vstore<A>(rows->sum[view] + lane, sum[view]);
      const auto both = (sum[0] != V{}) & (sum[1] != V{});
      const V ratio = both ? sum[1] / sum[0] : vset<A>(1);
      const V log_ratio = both ? vlog1p((sum[1] - sum[0]) / sum[0]) : V{};
      const V grown = factor[0] * (ratio / vload<A>(sums[kRatio] + lane));
      const V e = (raised[1] - raised[0]) + (log_ratio - vload<A>(sums[kLogRatio] + lane));
      const V moved = factor[1] == V{} ? V{} : factor[1] * e;
      const V bent =
          vabs<A>(e) < static_cast<A>(kNear) ? factor[1] * relative_entropy_series<A>(-e) : (grown - factor[1]) - moved;
      V entropy = vload<A>(sums[kEntropy] + lane), linear = vload<A>(sums[kLinear] + lane);
      entropy = entropy == infinite ? infinite : (grown * entropy - (bent + moved) * linear) + bent * seen;
      linear = factor[1] * linear - moved * seen;
      for_chunks(c, [&](int64_t begin, int64_t end) {
        V entropy_part{}, linear_part{};
        for (int64_t j = begin; j < end; ++j) {
          const V p = ratio * vload<A>(c.scores[0] + j * c.ld + lane), t = vload<A>(targets + j * Vec<A>::lanes);
          const V x = vload<A>(c.scores[1] + j * c.ld + lane) - log_ratio;
          V entry = relative_entropy<A>(p, t, x), product = t * x;
          if constexpr (kMasked) {
            const auto only_second = x == infinite, only_first = x == -infinite;
            entry = only_second ? infinite : entry;
            entry = only_first ? p : entry;
            product = only_first | only_second ? V{} : product;
          }
          entropy_part += entry, linear_part += product;
        }
        entropy += entropy_part, linear += linear_part;
      });
      vstore<A>(sums[kRatio] + lane, ratio);
      vstore<A>(sums[kLogRatio] + lane, log_ratio);
      vstore<A>(sums[kEntropy] + lane, entropy);
      vstore<A>(sums[kLinear] + lane, linear);
    }
  }

  // The statistics of the comparison are log (sum T^ / sum P^) and sum T x. A row in which T has no key counts nothing.
  static A finish(const A* alive, const RunningRows<A>& rows, LaneStats<A>* stats) {
    const A(*sums)[kLanes] = rows.of_comparison;
    double total = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      for (int view = 0; view < 2; ++view) finish_softmax(alive, rows, view, lane, stats);
      const bool counts = is_alive(alive, 1, lane);
      if (!counts) stats->inverse[0][lane] = 0;
      const A inverse = stats->inverse[1][lane];
      stats->of_comparison[0][lane] = sums[kLogRatio][lane];
      stats->of_comparison[1][lane] = counts ? sums[kLinear][lane] * inverse : A(0);
      total += counts ? sums[kEntropy][lane] * inverse : A(0);
    }
    return static_cast<A>(total);
  }

  // P - T, and T (x - sum T x).
  struct Terms {
    A gradient;
    V log_ratio, mean;

    Terms(const LaneStats<A>& stats, int64_t lane, A gradient)
        : gradient(gradient),
          log_ratio(vload<A>(stats.of_comparison[0] + lane)),
          mean(vload<A>(stats.of_comparison[1] + lane)) {}
    template <bool kSecond>
    void make(V p, V t, V difference, V* to, V* to_aug) const {
      *to = gradient * (p - t);
      if constexpr (kSecond) {
        // A head without upstream has no gradient, also where its divergence is infinite.
        const V weight = gradient * t;
        *to_aug = gradient == 0 ? weight : weight * ((difference - log_ratio) - mean);
      }
    }
  };

  template <bool kMasked, bool kSecond>
  static void gradient(const LaneGroup<A>& c, const LaneStats<A>& stats, A upstream) {
    softmax_gradient<Kl, kMasked, kSecond>(c, stats, upstream);
  }
};

}  // namespace
