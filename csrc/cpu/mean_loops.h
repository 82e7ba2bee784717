// The loops over scores where the averages over the heads of two views are compared. kernels_impl.h includes this, so
// that it is compiled once for each instruction set.
//
// Head h has P_h = exp(S_h - max_h) / sum_h. With M = the largest S_h - max_h of all heads, a weight w of 1 and the
// divisor H, or weights that add up to 1 and the divisor 1, it becomes
//
//   e_h = (w / sum_h) exp(S_h - max_h - M),   and the average is   P = E sum e_h / divisor   with   E = exp(M)
//
// so that the logarithm of P is known where P underflows. Where no logarithm is needed, M = 0. The slope F of an
// average is P dv/dP / sum e_h. So a head has the part e_h F of it, and the gradient of its scores is
//
//   dS_h = e_h (F - E d_h)   with   d_h = (sum of e_h F over keys) / w
#pragma once

#include "compare/js.h"
#include "compare/kl.h"

namespace {

using ear_ops::cpu::Averages;
using ear_ops::cpu::MeanLoops;

// Adds the exponentials of a tile of raw scores of one head to the sum of each row, under the largest score so far.
template <typename A, bool kMasked>
void add_softmax_of(const LaneGroup<A>& c, A* max, A* sum) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V before = vload<A>(max + lane);
    V best = before;
    for (int64_t j = 0; j < c.keys; ++j) best = vmax<A>(shifted_score<A, kMasked>(c, 0, j, lane, V{}), best);
    const V shift = shift_of<A>(best);
    V total = vload<A>(sum + lane) * vexp(before - shift);
    for_chunks(c, [&](int64_t begin, int64_t end) {
      V part{};
      for (int64_t j = begin; j < end; ++j) part += vexp(shifted_score<A, kMasked>(c, 0, j, lane, shift));
      total += part;
    });
    vstore<A>(max + lane, best);
    vstore<A>(sum + lane, total);
  }
}

template <typename A>
void add_softmax(const LaneGroup<A>& c, A* max, A* sum) {
  if (is_masked(c)) return add_softmax_of<A, true>(c, max, sum);
  add_softmax_of<A, false>(c, max, sum);
}

// Raises max to the largest score of a tile. Raw scores become those that a softmax takes, whose masks and bias are not
// read again.
template <typename A, bool kMasked>
void raise_max_of(const LaneGroup<A>& c, A* max) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    V best = vload<A>(max + lane);
    for (int64_t j = 0; j < c.keys; ++j) {
      const V score = shifted_score<A, kMasked>(c, 0, j, lane, V{});
      vstore<A>(c.scores[0] + j * c.ld + lane, score);
      best = vmax<A>(score, best);
    }
    vstore<A>(max + lane, best);
  }
}

template <typename A>
void raise_max(const LaneGroup<A>& c, A* max) {
  if (is_masked(c)) return raise_max_of<A, true>(c, max);
  raise_max_of<A, false>(c, max);
}

// What raise_max has left becomes exp(score - max), whose sum is written.
template <typename A>
void exponentiate(const LaneGroup<A>& c, const A* max, A* sum) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V shift = shift_of<A>(vload<A>(max + lane));
    V total{};
    for_chunks(c, [&](int64_t begin, int64_t end) {
      V part{};
      for (int64_t j = begin; j < end; ++j) {
        const V e = vexp(vload<A>(c.scores[0] + j * c.ld + lane) - shift);
        vstore<A>(c.scores[0] + j * c.ld + lane, e);
        part += e;
      }
      total += part;
    });
    vstore<A>(sum + lane, total);
  }
}

// Exponentials become e_h and are added to the sum over the heads.
template <typename A>
void add_exponentials(const LaneGroup<A>& c, const A* factor, A* sum) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V of_row = vload<A>(factor + lane);
    for (int64_t j = 0; j < c.keys; ++j) {
      const V exponential = vload<A>(c.scores[0] + j * c.ld + lane);
      const V e = exponential == V{} ? V{} : exponential * of_row;  // a masked key, which a NaN must not reach
      vstore<A>(c.scores[0] + j * c.ld + lane, e);
      vstore<A>(sum + j * c.ld + lane, vload<A>(sum + j * c.ld + lane) + e);
    }
  }
}

template <typename A, bool kMasked>
void raise_top_of(const LaneGroup<A>& c, const A* max, A* top) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V shift = shift_of<A>(vload<A>(max + lane));
    for (int64_t j = 0; j < c.keys; ++j) {
      const V score = shifted_score<A, kMasked>(c, 0, j, lane, shift);
      vstore<A>(c.scores[0] + j * c.ld + lane, score);
      vstore<A>(top + j * c.ld + lane, vmax<A>(score, vload<A>(top + j * c.ld + lane)));
    }
  }
}

template <typename A>
void raise_top(const LaneGroup<A>& c, const A* max, A* top) {
  if (is_masked(c)) return raise_top_of<A, true>(c, max, top);
  raise_top_of<A, false>(c, max, top);
}

// `shifted` gives the score minus max minus M of a key.
template <typename A, typename Shifted>
inline void add_head_of(const LaneGroup<A>& c, const A* factor, A* sum, const Shifted& shifted) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V of_row = vload<A>(factor + lane);
    for (int64_t j = 0; j < c.keys; ++j) {
      const V score = shifted(j, lane), product = vexp(score) * of_row;
      // Where the row has a NaN elsewhere, it must not reach masked keys.
      const V e = score == vset<A>(-INFINITY) ? V{} : product;
      vstore<A>(c.scores[0] + j * c.ld + lane, e);
      vstore<A>(sum + j * c.ld + lane, vload<A>(sum + j * c.ld + lane) + e);
    }
  }
}

template <typename A>
void add_head(const LaneGroup<A>& c, const A* max, const A* factor, const A* top, A* sum) {
  using V = typename Vec<A>::type;
  if (top) {
    add_head_of(c, factor, sum, [&](int64_t j, int64_t lane) -> V {
      return vload<A>(c.scores[0] + j * c.ld + lane) - shift_of<A>(vload<A>(top + j * c.ld + lane));
    });
  } else if (is_masked(c)) {
    add_head_of(c, factor, sum, [&](int64_t j, int64_t lane) -> V {
      return shifted_score<A, true>(c, 0, j, lane, shift_of<A>(vload<A>(max + lane)));
    });
  } else {
    add_head_of(c, factor, sum, [&](int64_t j, int64_t lane) -> V {
      return shifted_score<A, false>(c, 0, j, lane, shift_of<A>(vload<A>(max + lane)));
    });
  }
}

template <typename A>
void add_slopes(const LaneGroup<A>& c, const A* slopes, A* d) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    V total = vload<A>(d + lane);
    for_chunks(c, [&](int64_t begin, int64_t end) {
      V part{};
      for (int64_t j = begin; j < end; ++j)
        part += vload<A>(c.scores[0] + j * c.ld + lane) * vload<A>(slopes + j * c.ld + lane);
      total += part;
    });
    vstore<A>(d + lane, total);
  }
}

template <typename A>
void head_gradient(const LaneGroup<A>& c, const A* slopes, const A* peak, const A* d, A gradient) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V of_row = vload<A>(d + lane);
    for (int64_t j = 0; j < c.keys; ++j) {
      const V e = vload<A>(c.scores[0] + j * c.ld + lane), slope = vload<A>(slopes + j * c.ld + lane);
      const V rest = peak ? vload<A>(peak + j * c.ld + lane) * of_row : of_row;
      const V to = gradient * e * (slope - rest);
      vstore<A>(c.scores[0] + j * c.ld + lane, e == V{} ? V{} : to);  // a masked key, which a NaN must not reach
    }
  }
}

// Comparisons of averages. make() returns the value of an entry, and turns the sums of e_h into F and M into E.

template <typename A>
struct MeanMse {
  using V = typename Vec<A>::type;
  static constexpr bool kLogarithms = false;

  static V make(V*, V* sum, const A* divisor) {
    const V difference = sum[0] / divisor[0] - sum[1] / divisor[1];
    sum[0] = 2 * difference / divisor[0], sum[1] = -2 * difference / divisor[1];
    return difference * difference;
  }
};

template <typename A>
constexpr A smallest_normal() {
  return static_cast<A>(sizeof(A) == sizeof(double) ? 2.2250738585072014e-308 : 1.17549435e-38);
}

// log(x) of a positive, normal x.
inline f32v vlog(f32v x) {
  const i32v n = ((i32v)x - 0x3f3504f3) >> 23;  // x = 2^n m with m in [sqrt(1/2), sqrt(2))
  const f32v m = (f32v)((i32v)x - (n << 23)), power = __builtin_convertvector(n, f32v);
  return (vlog1p(m - 1) - power * 2.12194440e-4f) + power * 0.693359375f;
}

inline f64v vlog(f64v x) {
  f64v result;
  for (int i = 0; i < kDoubles; ++i) result[i] = log(x[i]);
  return result;
}

// KL(T || P), see compare/kl.h: F is (P - T) / sum e_h of the first view and E x / divisor of the second. x comes from
// T - P where they are close, else from M and the sums.
template <typename A>
struct MeanKl {
  using V = typename Vec<A>::type;
  static constexpr bool kLogarithms = true;

  static V make(V* top, V* sum, const A* divisor) {
    const V lowest = vset<A>(-INFINITY), infinite = vset<A>(INFINITY);
    V scaled[2], mean[2], shift[2];
    typename Vec<A>::mask absent[2];
    for (int view = 0; view < 2; ++view) {
      absent[view] = (top[view] == lowest) & (sum[view] == sum[view]);  // NaN is not seen by the largest score
      shift[view] = shift_of<A>(top[view]), scaled[view] = sum[view] / divisor[view];
      top[view] = vexp(shift[view]), mean[view] = rounded(top[view] * scaled[view]);
    }
    const V p = mean[0], t = mean[1], difference = t - p;
    const auto near = (vabs<A>(difference) < p * static_cast<A>(0.5)) & (p > smallest_normal<A>());
    V x = near ? vlog1p(difference / p) : (shift[1] - shift[0]) + (vlog(scaled[1]) - vlog(scaled[0]));
    x = absent[0] | absent[1] | (t == V{}) ? V{} : x;
    V entry = relative_entropy<A>(p, t, x);
    entry = absent[1] | (t == V{}) ? p : entry;  // also where T underflows
    const auto only_second = absent[0] & ~absent[1];
    entry = only_second ? infinite : entry;
    x = only_second ? infinite : x;
    sum[0] = sum[0] == V{} ? V{} : (p - t) / sum[0];
    sum[1] = absent[1] ? V{} : top[1] * x / divisor[1];
    return entry;
  }
};

// See compare/js.h; F is the logarithm of P / M or T / M over 2, and over the divisor.
template <typename A>
struct MeanJs {
  using V = typename Vec<A>::type;
  static constexpr bool kLogarithms = false;

  static V make(V*, V* sum, const A* divisor) {
    const V p = sum[0] / divisor[0], t = sum[1] / divisor[1], both = p + t;
    const V z = both == V{} ? V{} : (t - p) / both, distance = vabs<A>(z);
    const V share = 2 * (z < 0 ? t : p) / both, least = vset<A>(smallest_normal<A>());
    const auto near = distance < static_cast<A>(kNearJs);
    const V larger = vlog1p(distance), smaller = near ? vlog1p(-distance) : vlog(share < least ? least : share);
    const V slope = (z < 0 ? larger : smaller) * static_cast<A>(0.5);
    const V slope_aug = (z < 0 ? smaller : larger) * static_cast<A>(0.5);
    sum[0] = slope / divisor[0], sum[1] = slope_aug / divisor[1];
    return near ? Js<A>::series(p, t, z) : p * slope + t * slope_aug;
  }
};

template <typename A, template <typename> typename C>
A compare_averages(const Averages<A>& c) {
  using V = typename Vec<A>::type;
  double total = 0;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes)
    for (int64_t begin = 0; begin < c.keys; begin += kChunk) {
      const int64_t end = begin + kChunk < c.keys ? begin + kChunk : c.keys;
      V part{};
      for (int64_t j = begin; j < end; ++j) {
        const int64_t at = j * c.ld + lane;
        V sum[2] = {vload<A>(c.sum[0] + at), vload<A>(c.sum[1] + at)}, top[2] = {};
        if constexpr (C<A>::kLogarithms)
          for (int view = 0; view < 2; ++view) top[view] = vload<A>(c.top[view] + at);
        part += C<A>::make(top, sum, c.divisor);
        for (int view = 0; view < 2; ++view) {
          vstore<A>(c.sum[view] + at, sum[view]);
          if constexpr (C<A>::kLogarithms) vstore<A>(c.top[view] + at, top[view]);
        }
      }
      for (int64_t l = 0; l < Vec<A>::lanes; ++l) total += part[l];
    }
  return static_cast<A>(total);
}

template <typename A>
constexpr MeanLoops<A> mean_loops() {
  return {
      .add_softmax = add_softmax<A>,
      .raise_max = raise_max<A>,
      .exponentiate = exponentiate<A>,
      .add_exponentials = add_exponentials<A>,
      .raise_top = raise_top<A>,
      .add_head = add_head<A>,
      .compare = {compare_averages<A, MeanMse>, compare_averages<A, MeanKl>, compare_averages<A, MeanJs>},
      .add_slopes = add_slopes<A>,
      .head_gradient = head_gradient<A>,
  };
}

}  // namespace
