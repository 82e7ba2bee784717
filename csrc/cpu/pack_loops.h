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

#if !defined(__clang__)
// Swaps the off-diagonal S x S squares of every 2S x 2S square of r, and then all larger ones.
template <typename A, int S>
inline void swap_squares(typename Vec<A>::type* r) {
  constexpr int W = Vec<A>::lanes;
  if constexpr (S < W) {
    typename Vec<A>::mask low, high;
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l) {
      low[l] = (l & S) ? W + l - S : l;
      high[l] = (l & S) ? W + l : l + S;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      if (i & S) continue;
      const auto a = r[i], b = r[i + S];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + S] = __builtin_shuffle(a, b, high);
    }
    swap_squares<A, 2 * S>(r);
  }
}
#endif

// Transposes W x W, W the lanes of a vector.
template <typename A>
inline void transpose_square(const A* src, int64_t ld_src, A* dst, int64_t ld_dst) {
  constexpr int W = Vec<A>::lanes;
#if defined(__clang__)
  for (int64_t i = 0; i < W; ++i)
    for (int64_t j = 0; j < W; ++j) dst[i * ld_dst + j] = src[j * ld_src + i];
#else
  typename Vec<A>::type r[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) r[i] = vload<A>(src + i * ld_src);
  swap_squares<A, 1>(r);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) vstore<A>(dst + i * ld_dst, r[i]);
#endif
}

template <typename A>
void transpose(const A* src, int64_t ld_src, int64_t rows, int64_t cols, A* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t r = i + kLanes; r < i + 2 * kLanes && r < rows; ++r) prefetch(src + r * ld_src, cols);
    for (int64_t j = 0; j < cols; j += Vec<A>::lanes)
      for (int64_t row = i; row < i + kLanes; row += Vec<A>::lanes)
        transpose_square(src + row * ld_src + j, ld_src, dst + j * ld_dst + row, ld_dst);
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

void gather_bits(const uint16_t* src, int64_t stride, const int32_t* index, const uint8_t* real, int64_t n,
                 int64_t padded_rows, int64_t dim, int64_t ld, uint16_t* dst) {
  for (int64_t r = 0; r < n; ++r, dst += ld) {
    if (r + kAhead < n) prefetch(src + index[r + kAhead] * stride, dim);
    const bool zero = real && !real[index[r]];
    if (!zero) memcpy(dst, src + index[r] * stride, sizeof(*dst) * dim);
    memset(dst + (zero ? 0 : dim), 0, sizeof(*dst) * (zero ? ld : ld - dim));
  }
  memset(dst, 0, sizeof(*dst) * ld * (padded_rows - n));
}

// Two elements that lie side by side are one word, and words are transposed in registers as floats are.
inline void transpose_words(const uint16_t* src, int64_t ld_src, uint32_t* dst, int64_t ld_dst) {
#if defined(__clang__)
  for (int64_t i = 0; i < kFloats; ++i)
    for (int64_t j = 0; j < kFloats; ++j) memcpy(dst + j * ld_dst + i, src + i * ld_src + 2 * j, sizeof(*dst));
#else
  f32v r[kFloats];
#pragma GCC unroll 16
  for (int i = 0; i < kFloats; ++i) memcpy(&r[i], src + i * ld_src, sizeof(r[i]));
  swap_squares<float, 1>(r);
#pragma GCC unroll 16
  for (int i = 0; i < kFloats; ++i) memcpy(dst + i * ld_dst, &r[i], sizeof(r[i]));
#endif
}

void transpose_pairs(const uint16_t* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* dst) {
  auto* words = reinterpret_cast<uint32_t*>(dst);
  for (int64_t i = 0; i < rows; i += kFloats)
    for (int64_t j = 0; j < cols / 2; j += kFloats)
      transpose_words(src + i * ld_src + 2 * j, ld_src, words + j * rows + i, rows);
}

void transpose_bits(const uint16_t* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* dst, int64_t ld_dst) {
  for (int64_t i = 0; i < rows; i += kFloats)
    for (int64_t j = 0; j < cols; j += 2 * kFloats) {
      uint32_t words[kFloats * kFloats];
      transpose_words(src + i * ld_src + j, ld_src, words, kFloats);
      for (int64_t word = 0; word < kFloats; ++word) {
        u32v both;
        memcpy(&both, words + word * kFloats, sizeof(both));
        vstore_bits(dst + (j + 2 * word) * ld_dst + i, both & 0xffffu);
        vstore_bits(dst + (j + 2 * word + 1) * ld_dst + i, both >> 16);
      }
    }
}

void pair_rows(const uint16_t* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* dst) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < cols; j += kFloats) {
      u16v even, odd;
      memcpy(&even, src + i * ld_src + j, sizeof(even));
      memcpy(&odd, src + (i + 1) * ld_src + j, sizeof(odd));
      const u32v both = __builtin_convertvector(even, u32v) | __builtin_convertvector(odd, u32v) << 16;
      memcpy(dst + i * cols + 2 * j, &both, sizeof(both));
    }
}

void round_to_bf16(const float* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* left, uint16_t* right) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < cols; j += kFloats) {
      const u32v even = bf16_bits(vload<float>(src + i * ld_src + j));
      const u32v odd = bf16_bits(vload<float>(src + (i + 1) * ld_src + j));
      if (left) {
        vstore_bits(left + i * cols + j, even);
        vstore_bits(left + (i + 1) * cols + j, odd);
      }
      if (right) {
        const u32v both = even | odd << 16;
        memcpy(right + i * cols + 2 * j, &both, sizeof(both));
      }
    }
}

}  // namespace
