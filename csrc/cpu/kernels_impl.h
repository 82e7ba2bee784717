// The inner loops, compiled once per instruction set: the includer sets the target, then defines EAR_OPS_ISA (the
// table's name) and EAR_OPS_ISA_NAME. See vec.h for why nothing from torch or the C++ library may be included.
#pragma once

#include "kernels.h"
#include "row_loops.h"
#include "vec.h"

namespace {

using ear_ops::cpu::Column;
using ear_ops::cpu::ColumnStats;
using ear_ops::cpu::Isa;
using ear_ops::cpu::Kernels;
using ear_ops::cpu::kLanes;

constexpr int64_t kAhead = 16;  // rows: rows of a tensor lie far apart, where the processor does not look ahead

template <typename A>
void gather_rows(const void* src, Kind kind, int64_t stride, const int32_t* index, const uint8_t* real, int64_t n,
                 int64_t padded_rows, int64_t dim, int64_t ld, A* dst) {
  with_storage<A>(kind, [&](auto* storage) {
    const auto* base = same_type(storage, src);
    for (int64_t r = 0; r < n; ++r, dst += ld) {
      const auto* from = base + index[r] * stride;
      if (r + kAhead < n) prefetch(base + index[r + kAhead] * stride, dim);
      const bool zero = real && !real[index[r]];
      if (zero) {
        memset(dst, 0, sizeof(A) * ld);
        continue;
      }
      int64_t c = 0;
      for (; c + Vec<A>::lanes <= dim; c += Vec<A>::lanes) vstore<A>(dst + c, vload_as<A>(from + c));
      for (; c < dim; ++c) dst[c] = to_float(from[c]);
      for (; c < ld; ++c) dst[c] = 0;
    }
  });
  memset(dst, 0, sizeof(A) * ld * (padded_rows - n));
}

template <typename A>
void scatter_rows(const A* src, int64_t ld, int64_t n, int64_t dim, Kind kind, int64_t stride, const int32_t* index,
                  void* dst) {
  with_storage<A>(kind, [&](auto* storage) {
    auto* base = same_type(storage, dst);
    for (int64_t r = 0; r < n; ++r, src += ld) {
      auto* to = base + index[r] * stride;
      int64_t c = 0;
      for (; c + Vec<A>::lanes <= dim; c += Vec<A>::lanes) vstore_as<A>(to + c, vload<A>(src + c));
      for (; c < dim; ++c) from_float(src[c], to[c]);
    }
  });
}

#if defined(EAR_OPS_AVX512) && !defined(__clang__)
// 16 x 16 in registers: stage s swaps the off-diagonal s x s blocks of every 2s x 2s block.
inline void transpose_tile(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  f32x16 r[16];
  for (int i = 0; i < 16; ++i) r[i] = vload<float>(src + i * ld_src);
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; ++stage) {
    const int s = 1 << stage;
    i32x16 low, high;
    for (int l = 0; l < 16; ++l) {
      low[l] = (l & s) ? 16 + l - s : l;
      high[l] = (l & s) ? 16 + l : l + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & s) continue;
      f32x16 a = r[i], b = r[i + s];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + s] = __builtin_shuffle(a, b, high);
    }
  }
  for (int i = 0; i < 16; ++i) vstore<float>(dst + i * ld_dst, r[i]);
}
#else
inline void transpose_tile(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < kLanes; ++j) dst[i * ld_dst + j] = src[j * ld_src + i];
}
#endif

inline void transpose_tile(const double* src, int64_t ld_src, double* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < kLanes; ++j) dst[i * ld_dst + j] = src[j * ld_src + i];
}

template <typename A>
void transpose(const A* src, int64_t ld_src, int64_t rows, int64_t cols, A* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t r = i + kLanes; r < i + 2 * kLanes && r < rows; ++r) prefetch(src + r * ld_src, cols);
    for (int64_t j = 0; j < cols; j += kLanes)
      transpose_tile(src + i * ld_src + j, ld_src, dst + j * ld_dst + i, ld_dst);
  }
}

template <typename A, int kRows, int kVectors>
inline void product_tile(int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc,
                         bool accumulate) {
  constexpr int64_t W = Vec<A>::lanes;
  typename Vec<A>::type acc[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) acc[i][v] = accumulate ? vload<A>(c + i * ldc + v * W) : typename Vec<A>::type{};
  for (int64_t kk = 0; kk < k; ++kk) {
    for (int v = 0; v < kVectors; ++v) {
      const auto column = vload<A>(b + kk * ldb + v * W);
      for (int i = 0; i < kRows; ++i) acc[i][v] += a[i * lda + kk] * column;
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVectors; ++v) vstore<A>(c + i * ldc + v * W, acc[i][v]);
}

template <typename A>
void product(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc,
             bool accumulate) {
  constexpr int kVectors = kLanes / Vec<A>::lanes;
  for (int64_t j = 0; j < n; j += kLanes) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4)
      product_tile<A, 4, kVectors>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, accumulate);
    for (; i < m; ++i) product_tile<A, 1, kVectors>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, accumulate);
  }
}

constexpr int64_t kChunk = 64;  // keys summed in one go: sums of sums lose less than one long sum

template <typename A>
inline bool is_masked(const Column<A>& c) {
  return c.real[0] || c.bias[0] || c.first;
}

// Which of the queries from `lane` on may attend to key j in this view.
template <typename A>
inline auto allowed(const Column<A>& c, int view, int64_t j, int64_t lane) {
  const auto zero = typename Vec<A>::type{};
  if (c.real[view] && !c.real[view][j]) return zero != zero;
  auto attend = zero == zero;
  if (c.first) {
    const auto key = vset<A>(static_cast<A>(j));
    attend &= (key >= vload<A>(c.first + lane)) & (key < vload<A>(c.last + lane));
  }
  if (c.bias[view]) attend &= vload<A>(c.bias[view] + j * c.ld + lane) != vset<A>(-INFINITY);
  return attend;
}

// score - shift; -inf where the key is masked, whatever its score is.
template <typename A, bool kMasked>
inline typename Vec<A>::type shifted_score(const Column<A>& c, int view, int64_t j, int64_t lane,
                                           typename Vec<A>::type shift) {
  const auto raw = vload<A>(c.scores[view] + j * c.ld + lane);
  if constexpr (!kMasked) {
    return raw * c.scale - shift;
  } else {
    auto score = raw * c.scale;
    if (c.bias[view]) score += vload<A>(c.bias[view] + j * c.ld + lane);
    return allowed(c, view, j, lane) ? score - shift : vset<A>(-INFINITY);
  }
}

// What exponentials are taken relative to: the max, 0 where there was no key yet.
template <typename A>
inline typename Vec<A>::type shift_of(typename Vec<A>::type max) {
  return max == vset<A>(-INFINITY) ? typename Vec<A>::type{} : max;
}

template <typename A, bool kMasked>
inline void softmax_tile_of(const Column<A>& c, int view, int64_t lane, A* max, A* sum) {
  const auto before = vload<A>(max + lane);
  auto best = before;
  for (int64_t j = 0; j < c.keys; ++j)
    best = vmax<A>(shifted_score<A, kMasked>(c, view, j, lane, typename Vec<A>::type{}), best);
  const auto shift = shift_of<A>(best);
  auto total = vload<A>(sum + lane) * vexp(before - shift);
  for (int64_t begin = 0; begin < c.keys; begin += kChunk) {
    const int64_t end = begin + kChunk < c.keys ? begin + kChunk : c.keys;
    typename Vec<A>::type part{};
    for (int64_t j = begin; j < end; ++j) {
      const auto e = vexp(shifted_score<A, kMasked>(c, view, j, lane, shift));
      vstore<A>(c.scores[view] + j * c.ld + lane, e);
      part += e;
    }
    total += part;
  }
  vstore<A>(max + lane, best);
  vstore<A>(sum + lane, total);
}

template <typename A>
void softmax_tile(const Column<A>& c, ColumnStats<A>* stats) {
  for (int view = 0; view < 2; ++view)
    for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
      if (is_masked(c)) {
        softmax_tile_of<A, true>(c, view, lane, stats->max[view], stats->inverse[view]);
      } else {
        softmax_tile_of<A, false>(c, view, lane, stats->max[view], stats->inverse[view]);
      }
    }
}

// A query with keys whose scores are all -inf gets an infinite inverse and with it NaN, as a softmax gives it.
template <typename A>
void finish_softmax(const A* alive, ColumnStats<A>* stats) {
  for (int view = 0; view < 2; ++view)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      A& inverse = stats->inverse[view][lane];
      inverse = alive && alive[view * kLanes + lane] == 0 ? A(0) : 1 / inverse;
    }
}

enum class Scores { kRaw, kRawMasked, kExponentials };

template <typename A, Scores kScores>
inline typename Vec<A>::type probability(const Column<A>& c, int view, int64_t j, int64_t lane,
                                         typename Vec<A>::type shift, typename Vec<A>::type inverse) {
  if constexpr (kScores == Scores::kExponentials) return vload<A>(c.scores[view] + j * c.ld + lane) * inverse;
  return vexp(shifted_score<A, kScores == Scores::kRawMasked>(c, view, j, lane, shift)) * inverse;
}

template <typename A, Scores kScores>
A difference_tile_of(const Column<A>& c, ColumnStats<A>* stats) {
  using V = typename Vec<A>::type;
  V squared{};
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V shift[2] = {shift_of<A>(vload<A>(stats->max[0] + lane)), shift_of<A>(vload<A>(stats->max[1] + lane))};
    const V inverse[2] = {vload<A>(stats->inverse[0] + lane), vload<A>(stats->inverse[1] + lane)};
    V d[2] = {vload<A>(stats->d[0] + lane), vload<A>(stats->d[1] + lane)};
    for (int64_t begin = 0; begin < c.keys; begin += kChunk) {
      const int64_t end = begin + kChunk < c.keys ? begin + kChunk : c.keys;
      V squared_part{}, d_part{}, d_aug_part{};
      for (int64_t j = begin; j < end; ++j) {
        const V p = probability<A, kScores>(c, 0, j, lane, shift[0], inverse[0]);
        const V t = probability<A, kScores>(c, 1, j, lane, shift[1], inverse[1]);
        const V difference = p - t;
        squared_part += difference * difference;
        d_part += p * difference;
        d_aug_part -= t * difference;
      }
      squared += squared_part, d[0] += d_part, d[1] += d_aug_part;
    }
    for (int view = 0; view < 2; ++view) vstore<A>(stats->d[view] + lane, d[view]);
  }
  A total = 0;
  for (int64_t l = 0; l < Vec<A>::lanes; ++l) total += squared[l];
  return total;
}

template <typename A>
A difference_tile(const Column<A>& c, bool exponentials, ColumnStats<A>* stats) {
  if (exponentials) return difference_tile_of<A, Scores::kExponentials>(c, stats);
  if (is_masked(c)) return difference_tile_of<A, Scores::kRawMasked>(c, stats);
  return difference_tile_of<A, Scores::kRaw>(c, stats);
}

template <typename A, Scores kScores>
void gradient_tile_of(const Column<A>& c, const ColumnStats<A>& stats, A gradient) {
  using V = typename Vec<A>::type;
  for (int64_t lane = 0; lane < kLanes; lane += Vec<A>::lanes) {
    const V shift[2] = {shift_of<A>(vload<A>(stats.max[0] + lane)), shift_of<A>(vload<A>(stats.max[1] + lane))};
    const V inverse[2] = {vload<A>(stats.inverse[0] + lane), vload<A>(stats.inverse[1] + lane)};
    const V d = vload<A>(stats.d[0] + lane), d_aug = vload<A>(stats.d[1] + lane);
    for (int64_t j = 0; j < c.keys; ++j) {
      const V p = probability<A, kScores>(c, 0, j, lane, shift[0], inverse[0]);
      const V t = probability<A, kScores>(c, 1, j, lane, shift[1], inverse[1]);
      const V difference = p - t;
      V to = gradient * p * (difference - d), to_aug = gradient * t * (-difference - d_aug);
      if constexpr (kScores == Scores::kRawMasked) {  // a NaN elsewhere in the row must not reach masked keys
        to = allowed(c, 0, j, lane) ? to : V{};
        to_aug = allowed(c, 1, j, lane) ? to_aug : V{};
      }
      vstore<A>(c.scores[0] + j * c.ld + lane, to);
      vstore<A>(c.scores[1] + j * c.ld + lane, to_aug);
    }
  }
}

template <typename A>
void gradient_tile(const Column<A>& c, const ColumnStats<A>& stats, A gradient) {
  if (is_masked(c)) return gradient_tile_of<A, Scores::kRawMasked>(c, stats, gradient);
  gradient_tile_of<A, Scores::kRaw>(c, stats, gradient);
}

template <typename A>
void exponentials(const A* x, int64_t n, A* y) {
  for (int64_t j = 0; j < n; j += Vec<A>::lanes) vstore<A>(y + j, vexp(vload<A>(x + j)));
}

template <typename A>
void scale_row(const A* src, A factor, int64_t n, Kind kind, void* dst) {
  with_storage<A>(kind, [&](auto* storage) {
    auto* y = same_type(storage, dst);
    for (int64_t j = 0; j < n; ++j) from_float(factor * src[j], y[j]);
  });
}

void to_bf16(const float* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      Bf16 x;
      from_float(src[i * ld_src + j], x);
      dst[i * ld_dst + j] = x.bits;
    }
}

void to_vnni(const float* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* dst) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < cols; ++j) {
      Bf16 even, odd;
      from_float(src[i * ld_src + j], even);
      from_float(src[(i + 1) * ld_src + j], odd);
      dst[i * cols + 2 * j] = even.bits;
      dst[i * cols + 2 * j + 1] = odd.bits;
    }
}

template <typename A>
constexpr Kernels<A> table() {
  return {gather_rows<A>,        scatter_rows<A>,        transpose<A>,       product<A>,
          softmax_tile<A>,       finish_softmax<A>,      difference_tile<A>, gradient_tile<A>,
          squared_difference<A>, difference_gradient<A>, add_rows<A>,        exponentials<A>,
          scale_row<A>};
}

}  // namespace

namespace ear_ops::cpu {
extern const Isa EAR_OPS_ISA;
const Isa EAR_OPS_ISA = {EAR_OPS_ISA_NAME, table<float>(), table<double>(), to_bf16, to_vnni, fill_rows};
}  // namespace ear_ops::cpu
