// The loops over scores where the averages over the heads of two views are compared. kernels_impl.h includes this, so
// that it is compiled once for each instruction set.
//
// Head h has P_h = exp(S_h - max_h) / sum_h. With M = the largest S_h - max_h of all heads, a weight w of 1 and the
// divisor H, or weights that add up to 1 and the divisor 1, it becomes
//
//   e_h = exp(S_h - max_h - M),   f_h = w / sum_h,   and the average is   P = E sum f_h e_h / divisor   with  E =
//   exp(M)
//
// so that the logarithm of P is known where P underflows. Where no logarithm is needed, M = 0. The slope F of an
// average is P dv/dP / sum f_h e_h. So a head has the part f_h e_h F of it, and the gradient of its scores is
//
//   dS_h = f_h e_h (F - E d_h)   with   d_h = (sum of e_h F over keys) / sum_h
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

// Raises max to the largest score of a tile. With masks or a bias, which are not read again, the scores that a softmax
// takes replace the raw ones.
template <typename A, bool kMasked>
void raise_max_of(const LaneGroup<A>& c, A* max) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    V best = vload<A>(max + lane);
    for (int64_t j = 0; j < c.keys; ++j) {
      const V score = shifted_score<A, kMasked>(c, 0, j, lane, V{});
      if constexpr (kMasked) vstore<A>(c.scores[0] + j * c.ld + lane, score);
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

// What raise_max has left of a tile becomes exp(score - max), and is added to the sums.
template <typename A, bool kMasked>
void exponentiate_of(const LaneGroup<A>& c, const A* max, A* sum) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V shift = shift_of<A>(vload<A>(max + lane));
    V total = vload<A>(sum + lane);
    for_chunks(c, [&](int64_t begin, int64_t end) {
      V part{};
      for (int64_t j = begin; j < end; ++j) {
        const V e = vexp(kMasked ? vload<A>(c.scores[0] + j * c.ld + lane) - shift
                                 : shifted_score<A, false>(c, 0, j, lane, shift));
        vstore<A>(c.scores[0] + j * c.ld + lane, e);
        part += e;
      }
      total += part;
    });
    vstore<A>(sum + lane, total);
  }
}

template <typename A>
void exponentiate(const LaneGroup<A>& c, const A* max, A* sum) {
  if (is_masked(c)) return exponentiate_of<A, true>(c, max, sum);
  exponentiate_of<A, false>(c, max, sum);
}

// sum += f_h e_h of one key; 0 where e_h is, which is a masked key, whatever f_h is: it must not get another key's NaN.
template <typename A>
inline void add_to_average(typename Vec<A>::type e, typename Vec<A>::type factor, A* sum) {
  using V = typename Vec<A>::type;
  const V part = e * factor;
  vstore<A>(sum, vload<A>(sum) + (e == V{} ? V{} : part));
}

template <typename A>
void add_exponentials(const LaneGroup<A>& c, const A* factor, A* sum) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V of_row = vload<A>(factor + lane);
    for (int64_t j = 0; j < c.keys; ++j)
      add_to_average<A>(vload<A>(c.scores[0] + j * c.ld + lane), of_row, sum + j * c.ld + lane);
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
      const V e = vexp(shifted(j, lane));
      vstore<A>(c.scores[0] + j * c.ld + lane, e);
      add_to_average<A>(e, of_row, sum + j * c.ld + lane);
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

// dS_h of one key, times the scale that is in `factor`; 0 where e_h is: a masked key gets no other key's NaN.
template <typename A>
inline typename Vec<A>::type score_gradient(typename Vec<A>::type e, const A* slope, const A* peak,
                                            typename Vec<A>::type factor, typename Vec<A>::type d) {
  using V = typename Vec<A>::type;
  const V to = factor * e * (vload<A>(slope) - (peak ? vload<A>(peak) * d : d));
  return e == V{} ? V{} : to;
}

template <typename A>
void head_gradient(const LaneGroup<A>& c, const A* slopes, const A* peak, const A* factor, const A* d) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V of_row = vload<A>(d + lane), scale = vload<A>(factor + lane) * c.scale;
    for (int64_t j = 0; j < c.keys; ++j) {
      const int64_t at = j * c.ld + lane;
      vstore<A>(c.scores[0] + at,
                score_gradient<A>(vload<A>(c.scores[0] + at), slopes + at, peak ? peak + at : nullptr, scale, of_row));
    }
  }
}

template <typename A>
void head_gradient_bits(const LaneGroup<A>& c, const A* slopes, const A* peak, const A* factor, const A* d, int64_t n,
                        uint16_t* left, uint16_t* right, int64_t ld) {
  if constexpr (sizeof(A) == sizeof(float)) {
    for (int64_t lane = 0; lane < kLanes; lane += kFloats) {
      const f32v of_row = vload<A>(d + lane), scale = vload<A>(factor + lane) * c.scale;
      const auto bits = [&](int64_t j) {
        const int64_t at = j * c.ld + lane;
        return bf16_bits(
            score_gradient<A>(vload<A>(c.scores[0] + at), slopes + at, peak ? peak + at : nullptr, scale, of_row));
      };
      for (int64_t j = 0; j < n; j += 2) {
        const u32v even = j < c.keys ? bits(j) : u32v{}, odd = j + 1 < c.keys ? bits(j + 1) : u32v{};
        if (left) {
          vstore_bits(left + j * ld + lane, even);
          vstore_bits(left + (j + 1) * ld + lane, odd);
        }
        if (!right) continue;
        const u32v both = even | odd << 16;
        memcpy(right + j * ld + 2 * lane, &both, sizeof(both));
      }
    }
  }
}

// Comparisons of averages. make() returns the value of an entry, and turns the sums of f_h e_h into F and M into E.

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

// log(x) of a positive, normal x; NaN stays NaN.
inline f32v vlog(f32v x) {
  const i32v n = ((i32v)x - 0x3f3504f3) >> 23;  // x = 2^n m with m in [sqrt(1/2), sqrt(2))
  const f32v m = (f32v)((i32v)x - (n << 23)), power = __builtin_convertvector(n, f32v);
  const f32v result = (vlog1p(m - 1) - power * 2.12194440e-4f) + power * 0.693359375f;
  return x != x ? x : result;
}

inline f64v vlog(f64v x) {
  f64v result;
  for (int i = 0; i < kDoubles; ++i) result[i] = log(x[i]);
  return result;
}

// KL(T || P), see compare/kl.h: F is (P - T) / sum f_h e_h of the first view and E x / divisor of the second. x comes
// from T - P where they are close, else from M and the sums.
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
    const V larger = vlog1p_to_1(distance), smaller = near ? vlog1p(-distance) : vlog(share < least ? least : share);
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
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    V of_tile{};
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
      of_tile += part;
    }
    for (int64_t l = 0; l < Vec<A>::lanes; ++l) total += of_tile[l];
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
      .head_gradient_bits = head_gradient_bits<A>,
  };
}

}  // namespace
