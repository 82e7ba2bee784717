// sum (S - S^a)^2 of the scores themselves, over the keys that both views allow. There is no softmax.
#pragma once

#include "../score_loops.h"

namespace {

template <typename A>
struct Scores {
  using Scalar = A;
  using V = typename Vec<A>::type;
  static constexpr bool kTwoSweeps = false;

  static void start(RunningRows<A>* rows) { start_rows(rows); }

  template <bool kMasked>
  static V difference(const LaneGroup<A>& c, int64_t j, int64_t lane) {
    const V difference = shifted_score<A, kMasked>(c, 0, j, lane, V{}) - shifted_score<A, kMasked>(c, 1, j, lane, V{});
    if constexpr (!kMasked) return difference;
    return allowed(c, 0, j, lane) & allowed(c, 1, j, lane) ? difference : V{};
  }

  template <bool kMasked>
  static void add(const LaneGroup<A>& c, RunningRows<A>* rows) {
    A* squares = rows->of_comparison[0];
    for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes)
      for_chunks(c, [&](int64_t begin, int64_t end) {
        V part{};
        for (int64_t j = begin; j < end; ++j) {
          const V of_pair = difference<kMasked>(c, j, lane);
          part += of_pair * of_pair;
        }
        vstore<A>(squares + lane, vload<A>(squares + lane) + part);
      });
  }

  static A finish(const A*, const RunningRows<A>& rows, LaneStats<A>*) {
    double total = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) total += rows.of_comparison[0][lane];
    return static_cast<A>(total);
  }

  template <bool kMasked, bool kSecond>
  static void gradient(const LaneGroup<A>& c, const LaneStats<A>&, A upstream) {
    for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes)
      for (int64_t j = 0; j < c.keys; ++j) {
        const V to = 2 * upstream * difference<kMasked>(c, j, lane);
        vstore<A>(c.scores[0] + j * c.ld + lane, to);
        if constexpr (kSecond) vstore<A>(c.scores[1] + j * c.ld + lane, -to);
      }
  }
};

}  // namespace
