// The loops that bring rows of tensors into scratch and back, and the plain matrix product. kernels_impl.h includes
// this, so that it is compiled once for each instruction set.
#pragma once

#include "row_loops.h"

namespace {

using ear_ops::cpu::kLanes;

// Rows of a tensor lie far apart, where the processor does not look ahead by itself: so loops ask for later rows.
constexpr int64_t kAhead = 16;

template <typename A>
void gather_rows(const void* src, Kind kind, int64_t stride, const int32_t* index, const uint8_t* real, int64_t n,
                 int64_t padded_rows, int64_t dim, int64_t ld, A* dst) {
  with_storage<A>(kind, [&]<typename T>() {
    const auto* base = static_cast<const T*>(src);
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
  with_storage<A>(kind, [&]<typename T>() {
    auto* base = static_cast<T*>(dst);
    for (int64_t r = 0; r < n; ++r, src += ld) {
      auto* to = base + index[r] * stride;
      int64_t c = 0;
      for (; c + Vec<A>::lanes <= dim; c += Vec<A>::lanes) vstore_as<A>(to + c, vload<A>(src + c));
      for (; c < dim; ++c) from_float(src[c], to[c]);
    }
  });
}

#if defined(EAR_OPS_AVX512) && !defined(__clang__)
// Transposes 16 x 16 in registers. Stage s swaps the off-diagonal s x s squares of every 2s x 2s square.
inline void transpose_square(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
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
inline void transpose_square(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < kLanes; ++j) dst[i * ld_dst + j] = src[j * ld_src + i];
}
#endif

inline void transpose_square(const double* src, int64_t ld_src, double* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t j = 0; j < kLanes; ++j) dst[i * ld_dst + j] = src[j * ld_src + i];
}

template <typename A>
void transpose(const A* src, int64_t ld_src, int64_t rows, int64_t cols, A* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t r = i + kLanes; r < i + 2 * kLanes && r < rows; ++r) prefetch(src + r * ld_src, cols);
    for (int64_t j = 0; j < cols; j += kLanes)
      transpose_square(src + i * ld_src + j, ld_src, dst + j * ld_dst + i, ld_dst);
  }
}

template <typename A, int kRows, int kVectors>
inline void product_in_registers(int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc,
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
      product_in_registers<A, 4, kVectors>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, accumulate);
    for (; i < m; ++i)
      product_in_registers<A, 1, kVectors>(k, a + i * lda, lda, b + j, ldb, c + i * ldc + j, ldc, accumulate);
  }
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
}  // namespace
