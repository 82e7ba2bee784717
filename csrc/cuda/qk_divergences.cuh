// Divergences of two rows of probabilities, P of the first view and T of the second: Kullback-Leibler and
// Jensen-Shannon. Where the views are nearly equal, x = log T - log P is small, and a divergence is of the order x^2.
// So x comes from the scores, and every entry from x by a form in which no digits cancel.
#pragma once

#include "qk_scores.cuh"

namespace ear_ops::cuda {

// log(a / b) of two sums of exponentials under their maxima. It keeps its digits where they are nearly equal.
EAR_OPS_DEVICE float log_of_ratio(float a, float b) {
  const float inverse = reciprocal_fast(b), change = (a - b) * inverse;
  const float z = change * reciprocal_fast(2 + change), w = z * z;  // log(1 + change) = 2 atanh(z)
  const float near = 2 * z * (1 + w * (1 / 3.0f + w * (1 / 5.0f + w * (1 / 7.0f))));
  return fabsf(change) < 0.25f ? near : kLogOf2 * log2_fast(a * inverse);
}

// exp(-x) - 1 + x, for |x| < 1/2. The polynomial has the least relative error there, 3e-8.
EAR_OPS_DEVICE float excess(float x) {
  const float third =
      -0.166666655f + x * (0.0416657959f + x * (-0.00833345218f + x * (0.00139819974f - x * 0.000198756283f)));
  return x * x * (0.5f + x * third);
}

// KL(T || P) = sum T f(x) with f(x) = exp(-x) - 1 + x, which is P - T + T x. dS = g (P - T), and g T (x - KL) of the
// second view. A key that only the second view has makes it infinite. A row without a key in the second view gives 0.
struct Kl {
  static constexpr int kRowStats = static_cast<int>(row_stats_of(Comparison::kKl));
  static constexpr bool kInLog2 = true, kSweepsTwice = false, kMayBeInfinite = true, kSharesSlopes = false;
  static constexpr bool kFirstIsSimpler = false, kLongSlopes = false;
  static constexpr float kFactor = 1;
  static constexpr float kRange = 64;  // P - T is at most 1, and T (x - KL) a quarter of how far scores differ

  // What a lane sums of its two rows, over the keys that it has seen. With P^ = exp(s - max) of the first view, T^ of
  // the second, r = sum T^ / sum P^ and x the logarithm of T^ / (r P^), it keeps sum P^, sum T^, A = sum T^ f(x) and
  // B = sum T^ x. Under the maxima and the ratio r' of more keys, P^ is p P^, T^ is t T^ and x is x - e:
  //
  //   A' = p r'/r A - (q + t e) B + q sum T^ with q = t f(-e)
  //   B' = t (B - e sum T^)
  //
  // Nearly equal views have small x, e and q, so all of A' keeps its digits. What is infinite shows in B.
  struct Rows {
    float maximum[2][2], sum[2][2];  // of each view and half
    float ratio[2], logarithm[2];    // r and its logarithm; 1 and 0 where one view has no key yet
    float entries[2], weighted[2];   // A and B
    uint32_t alive;

    EAR_OPS_DEVICE Rows() : alive(0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[0][half] = maximum[1][half] = -infinity();
        ratio[half] = 1;
        sum[0][half] = sum[1][half] = logarithm[half] = entries[half] = weighted[half] = 0;
      }
    }

    // Brings A and B of a half under other maxima and under the ratio of other sums. `factor` is p and t, and `risen`
    // by how much the maximum of the second view has risen more than that of the first. sum T^ is still that of before.
    EAR_OPS_DEVICE void rebase(int half, const float (&factor)[2], float risen, const float (&sums)[2]) {
      const bool both = sums[0] != 0 && sums[1] != 0;
      const float before = ratio[half], log_before = logarithm[half], target = sum[1][half];
      ratio[half] = both ? sums[1] * reciprocal_fast(sums[0]) : 1.0f;
      logarithm[half] = both ? log_of_ratio(sums[1], sums[0]) : 0.0f;
      const float change = kLogOf2 * risen + (logarithm[half] - log_before);  // e
      const float changed = factor[1] == 0 ? 0.0f : factor[1] * change;       // never 0 times infinity
      const float of_first = factor[0] * (ratio[half] * reciprocal_fast(before));
      const float q = fabsf(change) < 0.5f ? factor[1] * excess(-change) : of_first - factor[1] - changed;
      entries[half] = of_first * entries[half] - (q + changed) * weighted[half] + q * target;
      weighted[half] = factor[1] * weighted[half] - changed * target;
    }

    // Adds the scores of a tile. They become exponentials.
    template <int kN>
    EAR_OPS_DEVICE void add(float (&scores)[2][kN / 8][4]) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float factor[2], shift[2], risen[2], sums[2];
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const float before = maximum[v][half];
#pragma unroll
          for (int n = 0; n < kN / 8; ++n)
            maximum[v][half] = fmaxf(maximum[v][half], fmaxf(scores[v][n][2 * half], scores[v][n][2 * half + 1]));
          shift[v] = shift_of(maximum[v][half]);
          risen[v] = shift[v] - shift_of(before);
          factor[v] = exponential(before, shift[v]);
          sums[v] = sum[v][half] * factor[v];
        }
        float x[kN / 8][2];  // in units of log 2, before log r is subtracted
#pragma unroll
        for (int n = 0; n < kN / 8; ++n)
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            float (&first)[4] = scores[0][n];
            float (&second)[4] = scores[1][n];
            const int e = 2 * half + odd;
            const float logs[2] = {first[e] - shift[0], second[e] - shift[1]};
            // A key that the second view does not have must not make 0 times infinity, nor NaN one that neither has.
            x[n][odd] = fmaxf(logs[1] - logs[0], -1e30f);
            first[e] = exp2_fast(logs[0]), second[e] = exp2_fast(logs[1]);
            sums[0] += first[e], sums[1] += second[e];
          }
        rebase(half, factor, risen[1] - risen[0], sums);
        sum[0][half] = sums[0], sum[1][half] = sums[1];
#pragma unroll
        for (int n = 0; n < kN / 8; ++n)
#pragma unroll
          for (int odd = 0; odd < 2; ++odd) {
            const float p = scores[0][n][2 * half + odd], t = scores[1][n][2 * half + odd];
            const float log = kLogOf2 * x[n][odd] - logarithm[half];
            const float far = t * log + (ratio[half] * p - t), near = t * excess(log);
            entries[half] += fabsf(log) < 0.5f ? near : far;
            weighted[half] += t * log;
          }
      }
    }

    // Puts the parts of the four lanes of a row together. Gives the row's statistics and returns the divergence.
    EAR_OPS_DEVICE float finish(int half, float (&stats)[cuda::kRowStats]) {
      float factor[2], risen[2], totals[2];
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        stats[v] = shift_of(quad_max(maximum[v][half]));
        risen[v] = stats[v] - shift_of(maximum[v][half]);
        factor[v] = exponential(maximum[v][half], stats[v]);
        totals[v] = quad_sum(sum[v][half] * factor[v]);
        stats[2 + v] = inverse_of_row(totals[v], alive >> (half + 2 * v) & 1);
      }
      rebase(half, factor, risen[1] - risen[0], totals);
      const float total = quad_sum(entries[half]), of_logs = quad_sum(weighted[half]);
      stats[5] = fabsf(of_logs) < infinity() ? fmaxf(total, 0.0f) * stats[3] : infinity();
      stats[5] += 0 * (stats[2] + stats[3]);  // NaN where a row is
      stats[4] = logarithm[half] + stats[5];
      if (stats[3] == 0)  // the maxima stay, for exponentials that are multiplied by 0
#pragma unroll
        for (int k = 2; k < kRowStats; ++k) stats[k] = 0;
      return stats[5];
    }
  };

  // Of scores and statistics (maximum, 1 / sum of exponentials; log r + KL, and KL, which is not read).
  template <bool kOfSecond, typename Stat>
  static EAR_OPS_DEVICE void slopes(float share, const float (&score)[2], const Stat& stat, float (&slope)[2]) {
    const float logs[2] = {score[0] - stat(0, 0), score[1] - stat(0, 1)};
    const float p = product(exp2_fast(logs[0]), stat(1, 0)), t = product(exp2_fast(logs[1]), stat(1, 1));
    slope[0] = share * (p - t);
    // A key that the second view does not have must not make 0 times infinity.
    const float x = fmaxf(logs[1] - logs[0], -1e30f);
    if (kOfSecond) slope[1] = share * t * (kLogOf2 * x - stat(2, 0));
  }
};

// JS = (KL(P || M) + KL(T || M)) / 2 with M = (P + T) / 2. Its entries are f of P + f of T with f = P log(P / M) / 2
// and f = T log(T / M) / 2. dS = g (f - P sum f), and likewise of the second view. A row that is empty in one view
// gives log(2) / 2 and no gradient.
struct Js {
  static constexpr int kRowStats = static_cast<int>(row_stats_of(Comparison::kJs));
  static constexpr bool kSweepsTwice = true;  // entries need the sums of whole rows
  static constexpr bool kInLog2 = true, kMayBeInfinite = false, kSharesSlopes = false;
  static constexpr bool kFirstIsSimpler = false, kLongSlopes = true;
  static constexpr float kFactor = 0.5f * kLogOf2;  // entries and f are made in units of log(2) / 2
  static constexpr float kRange = 16384;            // f is at most 2

  // All of an entry follows from P, T and x: log(P / M) is -x / 2 - log cosh(x / 2), and log(T / M) is
  // x / 2 - log cosh(x / 2). For small x the entry is (P + T) (x tanh(x / 2) / 2 - log cosh(x / 2)) / 2. For them both
  // log cosh and the bracket are polynomials in x^2 of the least relative error, 2e-7 and 1e-8.
  struct Entry {
    float value, f[2];
  };
  template <bool kOfSecond, bool kWithValue>
  static EAR_OPS_DEVICE Entry entry(float p, float t, float log2) {  // log2: x in units of log 2
    const float x = fmaxf(fminf(log2, 30.0f), -30.0f), w = x * x;    // beyond 30 one of the two does not matter
    const bool near = fabsf(x) < 0.75f;
    const float log_cosh = near ? w * (0.0866433868f + w * (-0.00173415479f + w * 5.38898509e-05f))
                                : 0.5f * fabsf(x) + (log2_fast(1 + exp2_fast(-fabsf(x))) - 1);
    Entry made;
    made.f[0] = p * (-0.5f * x - log_cosh);
    if (kOfSecond || kWithValue) made.f[1] = t * (0.5f * x - log_cosh);
    if (kWithValue) {
      const float series = 0.0866433971f + w * (-0.00520348022f + w * (0.000277515051f + w * -1.34109938e-05f));
      made.value = near ? (p + t) * (w * series) : made.f[0] + made.f[1];
    }
    return made;
  }

  // P, T and x in units of log 2, of scores, and of what a row subtracts from them and multiplies exponentials by.
  struct Probabilities {
    float p, t, log2;

    EAR_OPS_DEVICE Probabilities(const float (&score)[2], const float (&shift)[2], const float (&inverse)[2]) {
      const float logs[2] = {score[0] - shift[0], score[1] - shift[1]};
      p = product(exp2_fast(logs[0]), inverse[0]), t = product(exp2_fast(logs[1]), inverse[1]);
      log2 = logs[1] - logs[0];
    }
  };

  // What a lane knows of its two rows: the maxima and sums of exponentials of whole rows, which the first sweep over
  // the keys makes, and its part of the sums of the second sweep.
  struct Rows {
    float maximum[2][2], sum[2][2];    // of each view and half
    float shift[2][2], inverse[2][2];  // likewise, after the first sweep
    float values[2], f[2];             // f: of the first view
    uint32_t alive;

    EAR_OPS_DEVICE Rows() : alive(0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        values[half] = f[half] = 0;
#pragma unroll
        for (int v = 0; v < 2; ++v)
          maximum[v][half] = -infinity(), sum[v][half] = shift[v][half] = inverse[v][half] = 0;
      }
    }

    // Of the first sweep.
    template <int kN>
    EAR_OPS_DEVICE void measure(const float (&scores)[2][kN / 8][4]) {
      measure_rows<kN>(scores, maximum, sum);
    }

    // Ends the first sweep: maxima and sums become what a row subtracts from scores and multiplies exponentials by. One
    // view subtracts the logarithm of the sums' ratio, too, so that x is the difference of two numbers. Its multiplier
    // makes up for that. It is the view with the smaller maximum, whose float has more room for the logarithm.
    EAR_OPS_DEVICE void end_measuring() {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sums[2] = {sum[0][half], sum[1][half]};
        const float largest[2] = {shift_of(maximum[0][half]), shift_of(maximum[1][half])};
        const float log_ratio = sums[0] != 0 && sums[1] != 0 ? kLog2E * log_of_ratio(sums[1], sums[0]) : 0.0f;
        const bool in_first = fabsf(largest[0]) < fabsf(largest[1]);
        shift[0][half] = in_first ? largest[0] - log_ratio : largest[0];
        shift[1][half] = in_first ? largest[1] : largest[1] + log_ratio;
#pragma unroll
        for (int v = 0; v < 2; ++v)
          inverse[v][half] = sums[v] == 0 ? 0.0f : reciprocal_fast(sums[v]) * exp2_fast(shift[v][half] - largest[v]);
      }
    }

    // Of the second sweep: adds the entries of a tile.
    template <int kN>
    EAR_OPS_DEVICE void add(const float (&scores)[2][kN / 8][4]) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shifts[2] = {shift[0][half], shift[1][half]}, inverses[2] = {inverse[0][half], inverse[1][half]};
#pragma unroll
        for (int n = 0; n < kN / 8; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            const float score[2] = {scores[0][n][e], scores[1][n][e]};
            const Probabilities of(score, shifts, inverses);
            const Entry made = entry<false, true>(of.p, of.t, of.log2);
            values[half] += made.value, f[half] += made.f[0];
          }
      }
    }

    EAR_OPS_DEVICE float finish(int half, float (&stats)[cuda::kRowStats]) {
      float no_number = 0;                                               // or NaN, where a row is
      const bool both = inverse[0][half] != 0 && inverse[1][half] != 0;  // else there is no gradient
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const float of_row = inverse[v][half];
        no_number += of_row == 0 && (alive >> (half + 2 * v) & 1) ? not_a_number() : 0 * of_row;
        stats[v] = shift[v][half], stats[2 + v] = both ? of_row : 0.0f;
      }
      const float value = quad_sum(values[half]) + no_number;
      stats[4] = quad_sum(f[half]) + no_number, stats[5] = value - stats[4];
      return kFactor * value;
    }
  };

  // Of scores and statistics (what a softmax subtracts; what it multiplies by; sum f).
  template <bool kOfSecond, typename Stat>
  static EAR_OPS_DEVICE void slopes(float share, const float (&score)[2], const Stat& stat, float (&slope)[2]) {
    const float shift[2] = {stat(0, 0), stat(0, 1)}, inverse[2] = {stat(1, 0), stat(1, 1)};
    const Probabilities of(score, shift, inverse);
    const Entry made = entry<kOfSecond, false>(of.p, of.t, of.log2);
    slope[0] = share * (made.f[0] - of.p * stat(2, 0));
    if (kOfSecond) slope[1] = share * (made.f[1] - of.t * stat(2, 1));
  }
};

}  // namespace ear_ops::cuda
