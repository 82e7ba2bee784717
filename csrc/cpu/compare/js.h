// The Jensen-Shannon divergence. With M = (P + T) / 2 and z = (T - P) / (T + P), so that P = M (1 - z) and T = M (1 +
// z), an entry is the sum of
//
//   f   = P log(P / M) / 2 = P log(1 - z) / 2, which is P dv/dP, too
//   f_T = T log(T / M) / 2 = T log(1 + z) / 2
//
// The logarithm of the larger of P and T is log(1 + |z|), and the other one is that minus |x|, x = log T - log P.
// For small z, f and f_T cancel, and the entry is M / 2 (z^2 + z^4 / 6 + z^6 / 15 + ...), with 1 / (k (2 k - 1)) before
// z^(2 k). z takes the softmax of the whole row, so a first sweep makes its statistics and a second one the values.
#pragma once

#include "kl.h"

namespace {

constexpr double kNearJs = 0.3;  // |z| below which the series is used

template <typename A>
struct Js {
  using Scalar = A;
  using V = typename Vec<A>::type;
  static constexpr bool kTwoSweeps = true;

  static void start(RunningRows<A>* rows) { start_rows(rows); }

  template <bool kMasked>
  static void add(const LaneGroup<A>& c, RunningRows<A>* rows) {
    for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes)
      for (int view = 0; view < 2; ++view)
        add_exponentials<A, kMasked, false>(c, view, lane, rows->max[view], rows->sum[view]);
  }

  static A finish(const A* alive, const RunningRows<A>& rows, LaneStats<A>* stats) {
    for (int64_t lane = 0; lane < kLanes; ++lane)
      for (int view = 0; view < 2; ++view) {
        finish_softmax(alive, rows, view, lane, stats);
        stats->of_comparison[view][lane] = 0;
      }
    return 0;
  }

  // log (sum T^ / sum P^) from the inverses of the sums; 0 where a view has no key.
  static V log_ratio_of(V inverse, V inverse_aug) {
    const V ratio = vlog1p((inverse - inverse_aug) / inverse_aug);
    return (inverse == V{}) | (inverse_aug == V{}) ? V{} : ratio;
  }

  // f, f_T and z of an entry.
  struct Entry {
    V first, second, z;

    // `difference`: of the scores, each minus its maximum; `log_ratio`: log (sum T^ / sum P^).
    Entry(V p, V t, V difference, V log_ratio) {
      const V sum = p + t, x = vabs<A>(difference - log_ratio), farthest = vset<A>(1e4);  // exp(-1e4) is 0
      const V distance = x < farthest ? x : farthest;  // also of two keys that are masked
      z = sum == V{} ? V{} : (t - p) / sum;
      const V larger = vlog1p_to_1(vabs<A>(z)), smaller = larger - distance;
      first = p * static_cast<A>(0.5) * (z < 0 ? larger : smaller);
      second = t * static_cast<A>(0.5) * (z < 0 ? smaller : larger);
    }
  };

  // M / 2 (z^2 + z^4 / 6 + ...) for |z| below kNearJs.
  static V series(V p, V t, V z) {
    constexpr int kTerms = sizeof(A) == sizeof(double) ? 16 : 7;
    const V square = z * z;
    V sum{};
    for (int k = kTerms; k >= 1; --k) sum = sum * square + static_cast<A>(1.0 / (k * (2 * k - 1)));
    return (p + t) * static_cast<A>(0.25) * square * sum;
  }

  template <bool kMasked>
  static A add_values(const LaneGroup<A>& c, LaneStats<A>* stats) {
    double total = 0;
    for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
      const V shift[2] = {shift_of<A>(vload<A>(stats->max[0] + lane)), shift_of<A>(vload<A>(stats->max[1] + lane))};
      const V inverse[2] = {vload<A>(stats->inverse[0] + lane), vload<A>(stats->inverse[1] + lane)};
      const V log_ratio = log_ratio_of(inverse[0], inverse[1]);
      V values{};
      V slopes = vload<A>(stats->of_comparison[0] + lane), slopes_aug = vload<A>(stats->of_comparison[1] + lane);
      for_chunks(c, [&](int64_t begin, int64_t end) {
        V values_part{}, slopes_part{}, slopes_aug_part{};
        for (int64_t j = begin; j < end; ++j) {
          const V first = shifted_score<A, kMasked>(c, 0, j, lane, shift[0]);
          const V second = shifted_score<A, kMasked>(c, 1, j, lane, shift[1]);
          const V p = vexp(first) * inverse[0], t = vexp(second) * inverse[1];
          const Entry entry(p, t, second - first, log_ratio);
          const auto near = vabs<A>(entry.z) < static_cast<A>(kNearJs);
          values_part += near ? series(p, t, entry.z) : entry.first + entry.second;
          slopes_part += entry.first, slopes_aug_part += entry.second;
        }
        values += values_part, slopes += slopes_part, slopes_aug += slopes_aug_part;
      });
      for (int64_t l = 0; l < Vec<A>::lanes; ++l) total += values[l];
      vstore<A>(stats->of_comparison[0] + lane, slopes);
      vstore<A>(stats->of_comparison[1] + lane, slopes_aug);
    }
    return static_cast<A>(total);
  }

  // f - P sum f, and the same of T.
  struct Terms {
    A gradient;
    V log_ratio, slopes, slopes_aug;

    Terms(const LaneStats<A>& stats, int64_t lane, A gradient)
        : gradient(gradient),
          log_ratio(log_ratio_of(vload<A>(stats.inverse[0] + lane), vload<A>(stats.inverse[1] + lane))),
          slopes(vload<A>(stats.of_comparison[0] + lane)),
          slopes_aug(vload<A>(stats.of_comparison[1] + lane)) {}
    template <bool kSecond>
    void make(V p, V t, V difference, V* to, V* to_aug) const {
      const Entry entry(p, t, difference, log_ratio);
      *to = gradient * (entry.first - rounded(p * slopes));
      if constexpr (kSecond) *to_aug = gradient * (entry.second - rounded(t * slopes_aug));
    }
  };

  template <bool kMasked, bool kSecond>
  static void gradient(const LaneGroup<A>& c, const LaneStats<A>& stats, A upstream) {
    softmax_gradient<Js, kMasked, kSecond>(c, stats, upstream);
  }
};

}  // namespace
