// Squared errors of probabilities: the loss is sum (P - T)^2, dS = 2 g P ((P - T) - d) with d = sum P (P - T).
#pragma once

#include "qk_scores.cuh"

namespace ear_ops::cuda {

// A comparison, as the kernels take it. `Rows` is what a lane of the forward sums of its two rows, and `slopes` gives
// dS of one pair of a query and a key for the backward, times `share` of the upstream gradient.
struct Mse {
  static constexpr int kRowStats = static_cast<int>(row_stats_of(Comparison::kMse));
  static constexpr bool kInLog2 = true;          // scores come in units of log 2
  static constexpr bool kSweepsTwice = false;    // over the keys: the first time for the statistics of a row alone
  static constexpr bool kFirstIsSimpler = true;  // the first tile of a row has an `add` of its own
  static constexpr bool kMayBeInfinite = false;  // so that a head without upstream gradient has to be passed over
  static constexpr bool kSharesSlopes = true;    // dS of the second view is made even where nobody wants it
  static constexpr bool kLongSlopes = false;     // so that they leave registers for few scores
  static constexpr float kFactor = 2;            // of dS, multiplied in at the end

  // What dS is multiplied by before it is rounded to float16, in which it would vanish long before that matters
  // elsewhere. dS is at most 2.
  static constexpr float kRange = 16384;

  // What a lane sums of its two rows, over the keys that it has seen. With P^ = exp(s - max) of the first view, T^ of
  // the second, r = sum P^ / sum T^ and D^ = P^ - r T^, it keeps sum P^, sum T^, sum D^ D^, sum D^ T^ and sum T^ T^.
  // Where the softmax of the whole row is P = a P^ and T = b T^, all else follows:
  //
  //   P - T           = a D^ + c T^ with c = a r - b, which is near 0 where the row's own ratio is near r
  //   sum (P - T)^2   = a^2 sum D^ D^ + 2 a c sum D^ T^ + c^2 sum T^ T^
  //   sum T (P - T)   = b (a sum D^ T^ + c sum T^ T^)
  //   sum P (P - T)   = a (a sum D^ D^ + c sum D^ T^) + a r (a sum D^ T^ + c sum T^ T^)
  //
  // (P - T)^2 is never expanded into its three products, whose difference would lose the digits of close views.
  struct Rows {
    float maximum[2][2], sum[2][2];  // of each view and half
    float ratio[2], squares[2], mixed[2], targets[2];
    uint32_t alive;

    EAR_OPS_DEVICE Rows() : alive(0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[0][half] = maximum[1][half] = -infinity();
        ratio[half] = 1;
        sum[0][half] = sum[1][half] = squares[half] = mixed[half] = targets[half] = 0;
      }
    }

    // Adds the scores of a tile. They become exponentials. kFirst: nothing was added before.
    template <int kN, bool kFirst = false>
    EAR_OPS_DEVICE void add(float (&scores)[2][kN / 8][4]) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float factor[2];  // of what was summed before, under the maximum of now
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const float before = maximum[v][half];
#pragma unroll
          for (int n = 0; n < kN / 8; ++n)
            maximum[v][half] = fmaxf(maximum[v][half], fmaxf(scores[v][n][2 * half], scores[v][n][2 * half + 1]));
          const float shift = shift_of(maximum[v][half]);
          if (!kFirst) {
            factor[v] = exponential(before, shift);
            sum[v][half] *= factor[v];
          }
#pragma unroll
          for (int n = 0; n < kN / 8; ++n)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
              scores[v][n][e] = exponential(scores[v][n][e], shift);
              sum[v][half] += scores[v][n][e];
            }
        }
        const float before = ratio[half];
        ratio[half] = sum[1][half] == 0 ? 1 : sum[0][half] / sum[1][half];
        if (!kFirst) {
          const float step = factor[0] * before - factor[1] * ratio[half];
          squares[half] =
              factor[0] * factor[0] * squares[half] + 2 * factor[0] * step * mixed[half] + step * step * targets[half];
          mixed[half] = factor[1] * (factor[0] * mixed[half] + step * targets[half]);
          targets[half] *= factor[1] * factor[1];
        }
#pragma unroll
        for (int n = 0; n < kN / 8; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            const float target = scores[1][n][e], difference = scores[0][n][e] - ratio[half] * target;
            squares[half] += difference * difference;
            mixed[half] += difference * target;
            targets[half] += target * target;
          }
      }
    }

    // Puts the parts of the four lanes of a row together. Gives the row's statistics and returns sum (P - T)^2.
    EAR_OPS_DEVICE float finish(int half, float (&stats)[kRowStats]) const {
      float scale[2];  // of this lane's P^ and T^
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        stats[v] = shift_of(quad_max(maximum[v][half]));
        const float factor = exponential(maximum[v][half], stats[v]), total = quad_sum(sum[v][half] * factor);
        stats[2 + v] = inverse_of_row(total, alive >> (half + 2 * v) & 1);
        scale[v] = stats[2 + v] * factor;
      }
      const float first = scale[0], rest = first * ratio[half] - scale[1];
      const float of_differences = first * squares[half] + rest * mixed[half];
      const float of_targets = first * mixed[half] + rest * targets[half];
      const float loss = quad_sum(first * of_differences + rest * of_targets);
      stats[4] = quad_sum(first * (of_differences + ratio[half] * of_targets));
      stats[5] = -quad_sum(scale[1] * of_targets);
      return loss < 0 ? 0 : loss;  // after rounding
    }
  };

  // Of scores and statistics stat(k, v) of view v: maximum, 1 / sum of exponentials, d.
  template <bool kOfSecond, typename Stat>
  static EAR_OPS_DEVICE void slopes(float share, const float (&score)[2], const Stat& stat, float (&slope)[2]) {
    float p[2], d[2];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const float maximum = stat(0, v), inverse = stat(1, v);
      d[v] = stat(2, v);
      p[v] = product(exponential(score[v], maximum), inverse);
    }
#pragma unroll
    for (int v = 0; v < 2; ++v) slope[v] = share * (p[v] * ((p[v] - p[1 - v]) - d[v]));
  }
};

}  // namespace ear_ops::cuda
