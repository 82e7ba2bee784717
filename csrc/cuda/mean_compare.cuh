// What the averages over the heads are compared by. With the sum over the heads of e_h and a divisor, an average is
// P = E sum e_h / divisor. E is 1, or for comparisons that take logarithms the largest exponential of a head, whose
// logarithm is known where P underflows.
//
// compare() returns the value of an entry, and turns the sums of e_h into the slopes F = P dv/dP / sum e_h. A head then
// has the part e_h F of the slope of the average, and the gradient of its scores is
//
//   dS_h = e_h (F - E d_h)   with   d_h = (sum of e_h F over keys) / weight
#pragma once

#include "qk_divergences.cuh"

namespace ear_ops::cuda {

struct MeanMse {
  static constexpr bool kLogarithms = false;

  static EAR_OPS_DEVICE float compare(const float (&)[2], float (&sum)[2], const float (&divisor)[2]) {
    const float difference = sum[0] / divisor[0] - sum[1] / divisor[1];
    sum[0] = 2 * difference / divisor[0], sum[1] = -2 * difference / divisor[1];
    return difference * difference;
  }
};

constexpr float kSmallestNormal = 1.17549435e-38f;

// KL(T || P): F is (P - T) / sum e_h of the first view, and E x / divisor of the second. x = log T - log P comes from
// T - P where they are close, else from the sums and the logarithms of E, `top`. These are in units of log 2, and
// -infinity where no head has the key.
struct MeanKl {
  static constexpr bool kLogarithms = true;

  static EAR_OPS_DEVICE float compare(const float (&top)[2], float (&sum)[2], const float (&divisor)[2]) {
    float scaled[2], mean[2], largest[2];
    bool absent[2];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      absent[v] = top[v] == -infinity() && sum[v] == sum[v];  // NaN is not seen by the largest score
      scaled[v] = sum[v] / divisor[v];
      largest[v] = exp2_fast(shift_of(top[v])), mean[v] = product(largest[v], scaled[v]);
    }
    const float p = mean[0], t = mean[1];
    const bool near = fabsf(t - p) < 0.5f * p && p > kSmallestNormal;
    float x = near ? log_of_ratio(t, p)
                   : kLogOf2 * ((shift_of(top[1]) - shift_of(top[0])) + (log2_fast(scaled[1]) - log2_fast(scaled[0])));
    if (absent[0] || absent[1] || t == 0) x = 0;
    float entry = fabsf(x) < 0.5f ? t * excess(x) : fmaxf(t * x + (p - t), 0.0f) + 0 * x;  // NaN stays
    if (absent[1] || t == 0) entry = p;
    if (absent[0] && !absent[1]) entry = x = infinity();
    sum[0] = sum[0] == 0 ? 0.0f : (p - t) / sum[0];
    sum[1] = absent[1] ? 0.0f : largest[1] * x / divisor[1];
    return entry;
  }
};

// F is the logarithm of P / M or T / M over 2, and over the divisor.
struct MeanJs {
  static constexpr bool kLogarithms = false;

  static EAR_OPS_DEVICE float compare(const float (&)[2], float (&sum)[2], const float (&divisor)[2]) {
    const float p = sum[0] / divisor[0], t = sum[1] / divisor[1], far = t > p ? 40.0f : t < p ? -40.0f : 0.0f;
    const bool normal = p > kSmallestNormal && t > kSmallestNormal;
    const float log2 = normal ? kLog2E * log_of_ratio(t, p) : far;
    const Js::Entry made = Js::entry<true, true>(p, t, log2), slopes = Js::entry<true, false>(1, 1, log2);
    sum[0] = Js::kFactor * slopes.f[0] / divisor[0], sum[1] = Js::kFactor * slopes.f[1] / divisor[1];
    return Js::kFactor * made.value;
  }
};

}  // namespace ear_ops::cuda
