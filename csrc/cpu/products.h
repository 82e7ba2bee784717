// Products of packed matrices: C [m, n] (+)= left [m, k] right [k, n]. oneDNN's batch-reduce kernels (brgemm) make them
// where they run, else the table's plain loops do. n is padded to kLanes.
#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include "isa.h"

namespace ear_ops::cpu {

// Operands are of the arithmetic type itself, so that packing is free.
template <typename A>
struct PlainProducts {
  using Accumulator = A;
  using Operand = A;
  static constexpr bool kConverts = false;
  static constexpr int64_t kPadding = kLanes;

  const Kernels<A>& table;
  bool brgemm;

  explicit PlainProducts(const Selection& s)
      : table(kernels<A>(*s.isa)), brgemm(std::is_same_v<A, float> && s.isa != &kPortable) {}

  void left(const A*, int64_t, int64_t, int64_t, A*, int64_t) const {}
  void right(const A*, int64_t, int64_t, int64_t, A*) const {}
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

// Operands are rounded to bfloat16, the right one with its rows in twos. Sums are float32.
struct Bf16MatrixProducts {
  using Accumulator = float;
  using Operand = uint16_t;
  static constexpr bool kConverts = true;
  static constexpr int64_t kPadding = 2 * kLanes;  // what one register row of a matrix unit holds

  const Isa& isa;
  bool emulated;

  explicit Bf16MatrixProducts(const Selection& s) : isa(*s.isa), emulated(s.bf16 == Bf16Products::kEmulated) {}

  void left(const float* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* dst, int64_t ld_dst) const {
    isa.to_bf16(src, ld_src, rows, cols, dst, ld_dst);
  }
  void right(const float* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* dst) const {
    isa.to_vnni(src, ld_src, rows, cols, dst);
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
  if (kind == Kind::kBFloat16 && selection().bf16 != Bf16Products::kNone)
    return body.template operator()<Bf16MatrixProducts>();
  return body.template operator()<PlainProducts<float>>();
}

}  // namespace ear_ops::cpu
