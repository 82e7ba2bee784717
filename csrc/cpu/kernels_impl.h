// The inner loops, compiled once per instruction set: the includer sets the target, then defines EAR_OPS_ISA (the
// table's name) and EAR_OPS_ISA_NAME. See vec.h for why nothing from torch or the C++ library may be included.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using ear_ops::cpu::Isa;
using ear_ops::cpu::Kernels;
using ear_ops::cpu::Kind;
using ear_ops::cpu::kLanes;
using ear_ops::cpu::Row;
using ear_ops::cpu::RowStats;

// Calls body with a null pointer of the storage type, for its type alone. Float64 storage goes with float64 arithmetic.
template <typename A, typename Body>
void with_storage(Kind kind, const Body& body) {
  if constexpr (sizeof(A) == sizeof(double)) {
    body(static_cast<double*>(nullptr));
  } else if (kind == Kind::kBFloat16) {
    body(static_cast<Bf16*>(nullptr));
  } else if (kind == Kind::kFloat16) {
    body(static_cast<Half*>(nullptr));
  } else {
    body(static_cast<float*>(nullptr));
  }
}

template <typename T>
T* same_type(T*, void* pointer) {
  return static_cast<T*>(pointer);
}
template <typename T>
const T* same_type(T*, const void* pointer) {
  return static_cast<const T*>(pointer);
}

template <typename A>
void gather_rows(const void* src, Kind kind, int64_t stride, const int32_t* index, const uint8_t* real, int64_t n,
                 int64_t padded_rows, int64_t dim, int64_t ld, A* dst) {
  with_storage<A>(kind, [&](auto* storage) {
    const auto* base = same_type(storage, src);
    for (int64_t r = 0; r < n; ++r, dst += ld) {
      const auto* from = base + index[r] * stride;
      const bool zero = real && !real[index[r]];
      if (zero) {
        memset(dst, 0, sizeof(A) * ld);
        continue;
      }
      for (int64_t c = 0; c < dim; ++c) dst[c] = to_float(from[c]);
      for (int64_t c = dim; c < ld; ++c) dst[c] = 0;
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
      for (int64_t c = 0; c < dim; ++c) from_float(src[c], to[c]);
    }
  });
}

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
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
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < cols; j += kLanes)
      transpose_tile(src + i * ld_src + j, ld_src, dst + j * ld_dst + i, ld_dst);
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

// The masked scores at keys [j, j + lanes): scaled, biased, -inf where structure does not allow the key.
template <typename A>
inline typename Vec<A>::type masked_scores(const A* scores, const A* bias, const Row<A>& row, int64_t j) {
  constexpr int64_t W = Vec<A>::lanes;
  auto v = vload<A>(scores + j) * row.scale;
  if (bias) v += vload<A>(bias + j);
  if (j < row.first || j + W > row.last) {
    for (int64_t i = 0; i < W; ++i)
      if (j + i < row.first || j + i >= row.last) v[i] = -INFINITY;
  }
  return v;
}

template <typename A>
inline bool has_key(const A* bias, const Row<A>& row) {
  if (!bias) return row.first < row.last;
  for (int64_t j = row.first; j < row.last; ++j)
    if (bias[j] != -INFINITY) return true;
  return false;
}

// scores <- exp(masked scores - max) in [from, to), *inverse <- 1 / their sum. A row without any key becomes zeros with
// an inverse of 0; a real row of -inf scores becomes NaN, as a softmax does.
template <typename A>
inline void exponentials(A* scores, const A* bias, const Row<A>& row, int64_t from, int64_t to, A* max, A* inverse) {
  constexpr int64_t W = Vec<A>::lanes;
  if (!has_key(bias, row)) {
    if (to > from) memset(scores + from, 0, sizeof(A) * (to - from));
    *max = *inverse = 0;
    return;
  }
  auto best = vset<A>(-INFINITY);
  for (int64_t j = from; j < to; j += W) {
    const auto v = masked_scores(scores, bias, row, j);
    vstore<A>(scores + j, v);
    best = vmax<A>(v, best);
  }
  *max = vmax_lane<A>(best);
  typename Vec<A>::type total{};
  for (int64_t j = from; j < to; j += W) {
    const auto e = vexp(vload<A>(scores + j) - *max);
    vstore<A>(scores + j, e);
    total += e;
  }
  *inverse = 1 / vsum<A>(total);
}

template <typename A>
inline void padded_range(const Row<A>& row, int64_t* from, int64_t* to) {
  *from = row.first / kLanes * kLanes;
  *to = row.first < row.last ? (row.last + kLanes - 1) / kLanes * kLanes : *from;
}

template <typename A>
A forward_row(const Row<A>& row, RowStats<A>* stats) {
  constexpr int64_t W = Vec<A>::lanes;
  int64_t from, to;
  padded_range(row, &from, &to);
  exponentials(row.scores, row.bias, row, from, to, &stats->max, &stats->inverse);
  exponentials(row.scores_aug, row.bias_aug, row, from, to, &stats->max_aug, &stats->inverse_aug);
  typename Vec<A>::type squared{}, d{}, d_aug{};
  for (int64_t j = from; j < to; j += W) {
    const auto p = vload<A>(row.scores + j) * stats->inverse;
    const auto t = vload<A>(row.scores_aug + j) * stats->inverse_aug;
    const auto difference = p - t;
    squared += difference * difference;
    d += p * difference;
    d_aug -= t * difference;
  }
  stats->d = vsum<A>(d);
  stats->d_aug = vsum<A>(d_aug);
  return vsum<A>(squared);
}

template <typename A>
void backward_row(const Row<A>& row, const RowStats<A>& stats, A gradient) {
  constexpr int64_t W = Vec<A>::lanes;
  int64_t from, to;
  padded_range(row, &from, &to);
  const bool empty = stats.inverse == 0, empty_aug = stats.inverse_aug == 0;
  for (int64_t j = from; j < to; j += W) {
    auto p = typename Vec<A>::type{}, t = typename Vec<A>::type{};
    if (!empty) p = vexp(masked_scores(row.scores, row.bias, row, j) - stats.max) * stats.inverse;
    if (!empty_aug) t = vexp(masked_scores(row.scores_aug, row.bias_aug, row, j) - stats.max_aug) * stats.inverse_aug;
    const auto difference = p - t;
    vstore<A>(row.scores + j, gradient * p * (difference - stats.d));
    vstore<A>(row.scores_aug + j, gradient * t * (-difference - stats.d_aug));
  }
  for (int view = 0; view < 2; ++view) {
    A* scores = view ? row.scores_aug : row.scores;
    memset(scores + row.begin, 0, sizeof(A) * (from - row.begin));
    memset(scores + to, 0, sizeof(A) * (row.end - to));
  }
}

template <typename A>
A squared_difference(const void* a, const void* b, Kind kind, const uint8_t* mask, const uint8_t* mask_aug, int64_t n) {
  A lanes[kLanes] = {};
  A rest = 0;
  with_storage<A>(kind, [&](auto* storage) {
    const auto* x = same_type(storage, a);
    const auto* y = same_type(storage, b);
    if (mask) {
      for (int64_t j = 0; j < n; ++j) {
        const A difference = (mask[j] ? to_float(x[j]) : A(0)) - (mask_aug[j] ? to_float(y[j]) : A(0));
        rest += difference * difference;
      }
      return;
    }
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      for (int64_t l = 0; l < kLanes; ++l) {
        const A difference = to_float(x[j + l]) - to_float(y[j + l]);
        lanes[l] += difference * difference;
      }
    }
    for (; j < n; ++j) {
      const A difference = to_float(x[j]) - to_float(y[j]);
      rest += difference * difference;
    }
  });
  for (A lane : lanes) rest += lane;
  return rest;
}

template <typename A>
void difference_gradient(const void* a, const void* b, Kind kind, const uint8_t* mask, const uint8_t* mask_aug,
                         int64_t n, A gradient, void* grad_a, void* grad_b) {
  with_storage<A>(kind, [&](auto* storage) {
    const auto* x = same_type(storage, a);
    const auto* y = same_type(storage, b);
    auto* to_x = same_type(storage, grad_a);
    auto* to_y = same_type(storage, grad_b);
    for (int64_t j = 0; j < n; ++j) {
      const bool real = !mask || mask[j], real_aug = !mask || mask_aug[j];
      const A difference = gradient * ((real ? to_float(x[j]) : A(0)) - (real_aug ? to_float(y[j]) : A(0)));
      if (to_x) from_float(real ? difference : A(0), to_x[j]);
      if (to_y) from_float(real_aug ? -difference : A(0), to_y[j]);
    }
  });
}

template <typename A>
void add_row(const void* src, Kind kind, int64_t n, double* total) {
  with_storage<A>(kind, [&](auto* storage) {
    const auto* x = same_type(storage, src);
    for (int64_t j = 0; j < n; ++j) total[j] += to_float(x[j]);
  });
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
  return {gather_rows<A>,  scatter_rows<A>,       transpose<A>,           product<A>, forward_row<A>,
          backward_row<A>, squared_difference<A>, difference_gradient<A>, add_row<A>, scale_row<A>};
}

}  // namespace

namespace ear_ops::cpu {
extern const Isa EAR_OPS_ISA;
const Isa EAR_OPS_ISA = {EAR_OPS_ISA_NAME, table<float>(), table<double>(), to_bf16, to_vnni};
}  // namespace ear_ops::cpu
