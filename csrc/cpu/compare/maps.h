// Comparisons of maps that exist, such as maps of words, entry by entry: the value v of P and T, dv/dP and dv/dT. The
// definitions are those of the other files; x = log T - log P is taken from P and T. A probability of 0 has the
// gradient 0.
#pragma once

#include "js.h"

namespace {

using ear_ops::cpu::MapLoops;

template <typename A>
struct MapMse {
  using Scalar = A;
  using V = typename Vec<A>::type;
  static constexpr bool kTakesTarget = false;

  static V value(V p, V t) { return (p - t) * (p - t); }
  static void slopes(V p, V t, V* to, V* to_aug) { *to = 2 * (p - t), *to_aug = -*to; }
};

// x; infinite where one of P and T is 0, and 0 where both are. Of the smaller number on, so that digits are kept.
template <typename A>
inline typename Vec<A>::type log_ratio_of_maps(typename Vec<A>::type p, typename Vec<A>::type t) {
  using V = typename Vec<A>::type;
  const V less = p < t ? p : t, more = p < t ? t : p;
  const V distance = less == V{} ? vset<A>(INFINITY) : vlog1p((more - less) / less);
  const V x = p < t ? distance : -distance;
  return p == t ? V{} : x;
}

template <typename A>
struct MapKl {
  using Scalar = A;
  using V = typename Vec<A>::type;
  static constexpr bool kTakesTarget = true;  // a row in which T is 0 everywhere counts nothing

  static V value(V p, V t) {
    const V x = log_ratio_of_maps<A>(p, t);
    const V entry = relative_entropy<A>(p, t, x);  // NaN where x is infinite
    return t == V{} ? p : (p == V{} ? vset<A>(INFINITY) : entry);
  }
  static void slopes(V p, V t, V* to, V* to_aug) {
    *to = p == V{} ? V{} : (p - t) / p;
    *to_aug = t == V{} ? V{} : log_ratio_of_maps<A>(p, t);
  }
};

template <typename A>
struct MapJs {
  using Scalar = A;
  using V = typename Vec<A>::type;
  static constexpr bool kTakesTarget = false;

  struct Logs {
    V of_first, of_second, z;  // log(P / M) / 2, log(T / M) / 2

    Logs(V p, V t) {
      const V x = vabs<A>(log_ratio_of_maps<A>(p, t)), farthest = vset<A>(1e4), sum = p + t;
      const V distance = x > farthest ? farthest : x;
      z = sum == V{} ? V{} : (t - p) / sum;
      const V larger = vlog1p_to_1(vabs<A>(z)), smaller = larger - distance;
      of_first = static_cast<A>(0.5) * (z < 0 ? larger : smaller);
      of_second = static_cast<A>(0.5) * (z < 0 ? smaller : larger);
    }
  };

  static V value(V p, V t) {
    const Logs logs(p, t);
    return vabs<A>(logs.z) < static_cast<A>(kNearJs) ? Js<A>::series(p, t, logs.z)
                                                     : p * logs.of_first + t * logs.of_second;
  }
  static void slopes(V p, V t, V* to, V* to_aug) {
    const Logs logs(p, t);
    *to = p == V{} ? V{} : logs.of_first;
    *to_aug = t == V{} ? V{} : logs.of_second;
  }
};

template <typename C, typename A>
inline bool counts(const A* target, int64_t n) {
  if constexpr (!C::kTakesTarget) return true;
  for (int64_t j = 0; j < n; ++j)
    if (target[j] != 0) return true;
  return false;
}

template <typename C, typename A>
double map_value(const A* p, const A* t, int64_t rows, int64_t n) {
  using V = typename Vec<A>::type;
  double total = 0;
  for (int64_t i = 0; i < rows; ++i, p += n, t += n) {
    if (!counts<C>(t, n)) continue;
    V of_row{};
    for (int64_t begin = 0; begin < n; begin += kChunk * Vec<A>::lanes) {
      V part{};
      for (int64_t j = begin; j < n && j < begin + kChunk * Vec<A>::lanes; j += Vec<A>::lanes)
        part += C::value(vload<A>(p + j), vload<A>(t + j));
      of_row += part;
    }
    for (int64_t l = 0; l < Vec<A>::lanes; ++l) total += of_row[l];
  }
  return total;
}

template <typename C, typename A>
void map_gradients(const A* p, const A* t, int64_t rows, int64_t n, A gradient, A* to, A* to_aug) {
  using V = typename Vec<A>::type;
  const V infinite = vset<A>(INFINITY);
  for (int64_t i = 0; i < rows; ++i) {
    const bool row_counts = counts<C>(t + i * n, n);
    for (int64_t j = i * n; j < (i + 1) * n; j += Vec<A>::lanes) {
      V slope{}, slope_aug{};
      if (row_counts) C::slopes(vload<A>(p + j), vload<A>(t + j), &slope, &slope_aug);
      // A head without upstream has no gradient, also where its divergence is infinite.
      if (gradient == 0) slope_aug = vabs<A>(slope_aug) == infinite ? V{} : slope_aug;
      if (to) vstore<A>(to + j, gradient * slope);
      if (to_aug) vstore<A>(to_aug + j, gradient * slope_aug);
    }
  }
}

template <typename C>
constexpr MapLoops<typename C::Scalar> map_loops() {
  return {.value = map_value<C, typename C::Scalar>, .gradients = map_gradients<C, typename C::Scalar>};
}

}  // namespace
