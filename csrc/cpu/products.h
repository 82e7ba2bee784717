// Products of packed matrices: C [m, n] (+)= left [m, k] right [k, n]. oneDNN's batch-reduce kernels (brgemm) make them
// where they run, else plain loops do. Each kind of products also packs its operands. n is padded to kPadding.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include "isa.h"

namespace ear_ops::cpu {

// Operands are of the arithmetic type itself.
template <typename A>
struct PlainProducts {
  using Accumulator = A;
  using Operand = A;
  static constexpr Kind kOperand = sizeof(A) == sizeof(double) ? Kind::kFloat64 : Kind::kFloat32;
  static constexpr bool kInPairs = false;      // right operands are as they lie
  static constexpr int64_t kPadding = kLanes;  // of queries and keys
  static constexpr int64_t kWidth = kLanes;    // that the head dimension is padded to

  const Kernels<A>& table;
  bool brgemm;

  explicit PlainProducts(const Selection& s)
      : table(kernels<A>(*s.isa)), brgemm(std::is_same_v<A, float> && s.isa != &kPortable) {}

  const char* name() const {
    if (sizeof(A) == sizeof(double)) return "float64 (plain loops)";
    return brgemm ? "float32 (oneDNN)" : "float32 (plain loops)";
  }
  void gather(const void* src, Kind kind, int64_t stride, const int32_t* index, const uint8_t* real, int64_t n,
              int64_t padded_rows, int64_t dim, int64_t ld, A* dst) const {
    table.gather_rows(src, kind, stride, index, real, n, padded_rows, dim, ld, dst);
  }
  void transpose(const A* src, int64_t ld_src, int64_t rows, int64_t cols, A* dst, int64_t ld_dst) const {
    table.transpose(src, ld_src, rows, cols, dst, ld_dst);
  }
  void columns(const A* src, int64_t ld_src, int64_t rows, int64_t cols, A* dst) const {
    table.transpose(src, ld_src, rows, cols, dst, rows);
  }
  void multiply(int64_t m, int64_t n, int64_t k, const A* left, int64_t lda, const A* right, int64_t ldb, A* c,
                int64_t ldc, bool accumulate) const {
    if constexpr (std::is_same_v<A, float>) {
      if (brgemm) return at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, left, right, c, false);
    }
    table.product(m, n, k, left, lda, right, ldb, c, ldc, accumulate);
  }
  void release() const {
    if (brgemm) at::native::cpublas::brgemm_release(false);
  }
};

// Operands are bfloat16, the right one with its rows in twos. Sums are float32. So the tensor's own elements are
// operands, and gradients of scores are rounded. float16 has no such products here: its range is too small for
// gradients of scores, and units that take it also sum in it.
template <Bf16Products kUnit>
struct PairProducts {
  using Accumulator = float;
  using Operand = uint16_t;
  static constexpr Kind kOperand = Kind::kBFloat16;
  static constexpr bool kInPairs = true;
  static constexpr int64_t kPadding = kUnit == Bf16Products::kDot ? kLanes : 2 * kLanes;
  static constexpr int64_t kWidth = 2 * kLanes;

  const Isa& isa;
  bool emulated;

  explicit PairProducts(const Selection& s) : isa(*s.isa), emulated(s.emulated) {}

  const char* name() const { return emulated ? "bfloat16 (emulated)" : "bfloat16 (oneDNN)"; }
  void gather(const void* src, Kind, int64_t stride, const int32_t* index, const uint8_t* real, int64_t n,
              int64_t padded_rows, int64_t dim, int64_t ld, uint16_t* dst) const {
    isa.gather_bits(static_cast<const uint16_t*>(src), stride, index, real, n, padded_rows, dim, ld, dst);
  }
  void transpose(const uint16_t* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* dst, int64_t ld_dst) const {
    isa.transpose_bits(src, ld_src, rows, cols, dst, ld_dst);
  }
  void columns(const uint16_t* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* dst) const {
    isa.transpose_pairs(src, ld_src, rows, cols, dst);
  }
  void pair_rows(const uint16_t* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* dst) const {
    isa.pair_rows(src, ld_src, rows, cols, dst);
  }
  void round(const float* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* left, uint16_t* right) const {
    isa.round_to_bf16(src, ld_src, rows, cols, left, right);
  }
  void multiply(int64_t m, int64_t n, int64_t k, const uint16_t* left, int64_t lda, const uint16_t* right, int64_t ldb,
                float* c, int64_t ldc, bool accumulate) const {
    const auto* a = reinterpret_cast<const at::BFloat16*>(left);
    const auto* b = reinterpret_cast<const at::BFloat16*>(right);
    if (!emulated) return at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, accumulate, a, b, c, true);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        float total = accumulate ? c[i * ldc + j] : 0.0f;
        for (int64_t kk = 0; kk < k; ++kk)
          total += static_cast<float>(a[i * lda + kk]) * static_cast<float>(b[(kk / 2 * ldb + j) * 2 + kk % 2]);
        c[i * ldc + j] = total;
      }
  }
  void release() const {
    if (!emulated) at::native::cpublas::brgemm_release(true);
  }
};

// Calls body with the products that fit inputs of this kind as its template argument.
template <typename Body>
auto with_products(Kind kind, const Body& body) {
  if (kind == Kind::kFloat64) return body.template operator()<PlainProducts<double>>();
  if (kind == Kind::kBFloat16 && selection().bf16 == Bf16Products::kDot)
    return body.template operator()<PairProducts<Bf16Products::kDot>>();
  if (kind == Kind::kBFloat16 && selection().bf16 == Bf16Products::kMatrix)
    return body.template operator()<PairProducts<Bf16Products::kMatrix>>();
  return body.template operator()<PlainProducts<float>>();
}

}  // namespace ear_ops::cpu
