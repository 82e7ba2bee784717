// Comparisons of maps of words, entry by entry: the value v of P and T, and its slopes dv/dP and dv/dT. A probability
// of 0 has the slope 0. The definitions are those of the other files; x = log T - log P is taken from P and T.
#pragma once

#include "qk_divergences.cuh"

namespace ear_ops::cuda {

struct MapMse {
  static constexpr float kFactor = 2;     // of the slopes, multiplied in at the end
  static constexpr float kRange = 16384;  // as for tokens: what dS is multiplied by before it is rounded to float16

  static EAR_OPS_DEVICE float value(float p, float t) { return (p - t) * (p - t); }
  static EAR_OPS_DEVICE void slopes(float p, float t, float (&slope)[2]) { slope[0] = p - t, slope[1] = t - p; }
};

// x; infinite where one of P and T is 0, and 0 where both are.
EAR_OPS_DEVICE float log_ratio_of_maps(float p, float t) {
  constexpr float kTiny = 1e-30f, kHuge = 1e30f;  // 1 over less than kTiny may be infinite
  if (p == t) return 0;
  const float less = fminf(p, t), more = fmaxf(p, t);
  float x = log_of_ratio(more, less);
  if (less < kTiny) x = kLogOf2 * (log2_fast(more * kHuge) - log2_fast(less * kHuge));
  return p < t ? x : p > t ? -x : not_a_number();
}

struct MapKl {
  static constexpr float kFactor = 1;
  static constexpr float kRange = 64;  // see Kl in qk_divergences.cuh

  static EAR_OPS_DEVICE float value(float p, float t) {
    if (t == 0) return p;
    if (p == 0) return infinity();
    const float x = log_ratio_of_maps(p, t);
    const float near = t * excess(x), far = t * x + (p - t);
    const float entry = fabsf(x) < 0.5f ? near : far;
    return entry < 0 ? 0 : entry;
  }
  static EAR_OPS_DEVICE void slopes(float p, float t, float (&slope)[2]) {
    constexpr float kMost = 3e38f;  // times P this is finite, as it should be
    slope[0] = p == 0 ? 0 : (p - t) / p;
    if (slope[0] < -kMost) slope[0] = -kMost;
    slope[1] = t == 0 ? 0 : log_ratio_of_maps(p, t);
  }
};

struct MapJs {
  static constexpr float kFactor = Js::kFactor;
  static constexpr float kRange = Js::kRange;

  static EAR_OPS_DEVICE float value(float p, float t) {
    return kFactor * Js::entry<true, true>(p, t, kLog2E * log_ratio_of_maps(p, t)).value;
  }
  static EAR_OPS_DEVICE void slopes(float p, float t, float (&slope)[2]) {
    const Js::Entry logs = Js::entry<true, false>(1, 1, kLog2E * log_ratio_of_maps(p, t));
    const float no_number = 0 * (p + t);  // or NaN, where one of them is
    slope[0] = p == 0 ? no_number : logs.f[0] + no_number;
    slope[1] = t == 0 ? no_number : logs.f[1] + no_number;
  }
};

// Calls use(maps) with the comparison's type. Maps are few beside products, so that one kernel serves all comparisons.
template <typename Use>
EAR_OPS_DEVICE auto with_maps(Comparison comparison, const Use& use) {
  if (comparison == Comparison::kKl) return use(MapKl{});
  if (comparison == Comparison::kJs) return use(MapJs{});
  return use(MapMse{});
}

}  // namespace ear_ops::cuda
