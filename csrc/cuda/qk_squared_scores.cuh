// Squared differences of scores before the softmax, over the pairs of a query and a key that both views allow.
#pragma once

#include "qk_scores.cuh"

namespace ear_ops::cuda {

struct SquaredScores {
  static constexpr int kRowStats = static_cast<int>(row_stats_of(Comparison::kScores));  // none
  static constexpr bool kInLog2 = false, kSweepsTwice = false, kMayBeInfinite = false, kSharesSlopes = true;
  static constexpr bool kFirstIsSimpler = false, kLongSlopes = false;
  static constexpr float kFactor = 2;
  static constexpr float kRange = 64;  // scores of 16-bit models differ by less than 1000

  // s - t; 0 where a view masks the pair.
  static EAR_OPS_DEVICE float difference(float first, float second) {
    return fminf(first, second) == -infinity() ? 0.0f : first - second;
  }

  struct Rows {
    float squares[2] = {0, 0};  // of each half
    uint32_t alive = 0;

    template <int kN>
    EAR_OPS_DEVICE void add(const float (&scores)[2][kN / 8][4]) {
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float of_pair = difference(scores[0][n][e], scores[1][n][e]);
          squares[e / 2] += of_pair * of_pair;
        }
    }
    EAR_OPS_DEVICE float finish(int half, float (&)[cuda::kRowStats]) { return quad_sum(squares[half]); }
  };

  template <bool, typename Stat>
  static EAR_OPS_DEVICE void slopes(float share, const float (&score)[2], const Stat&, float (&slope)[2]) {
    slope[0] = share * difference(score[0], score[1]);
    slope[1] = -slope[0];
  }
};

}  // namespace ear_ops::cuda
