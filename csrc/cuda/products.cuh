// Matrix products of one warp over vectors in shared memory, in the fragments of m16n8: lane l = 4 g + t holds of a
// 16 x 8 product the elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#pragma once

#include "primitives.cuh"

namespace ear_ops::cuda {

// How vectors of kD features lie in shared memory. The padding spreads those that are read together over all banks.
// That of floats also holds a power of two (split_products.cuh).
template <typename T, int kD>
struct SharedVectors {
  static constexpr int kVectorBytes = kD * sizeof(T) + 16;
  static EAR_OPS_CONSTANT int bytes(int vectors) { return vectors * kVectorBytes; }
  static EAR_OPS_CONSTANT int offset(int vector, int feature) {
    return vector * kVectorBytes + feature * static_cast<int>(sizeof(T));
  }
  static EAR_OPS_DEVICE const char* at(const char* base, int vector, int feature) {
    return base + offset(vector, feature);
  }
};

template <typename T>
struct Products {  // 16-bit elements; those of float are in split_products.cuh
  static constexpr bool kSplit = false;

  // scores [16, kN] += owned [16, kD] visited [kN, kD]^T
  template <int kD, int kN, bool kSwapped>
  static EAR_OPS_DEVICE void add_scores(const char* owned, const char* visited, float (&scores)[kN / 8][4]) {
    using Layout = SharedVectors<T, kD>;
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int k = 0; k < kD; k += 16) {
      uint32_t a[4];
      load_matrices<false>(a, Layout::at(owned, lane % 16, k + lane / 16 * 8));
#pragma unroll
      for (int n = 0; n < kN; n += 16) {
        uint32_t b[4];
        load_matrices<false>(b, Layout::at(visited, n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
        multiply_add(T{}, scores[n / 8], a, b[0], b[1]);
        multiply_add(T{}, scores[n / 8 + 1], a, b[2], b[3]);
      }
    }
  }

  // out [16, kD] += weights [16, kN] values [kN, kD]
  template <int kD, int kN>
  static EAR_OPS_DEVICE void add_weighted(const float (&weights)[kN / 8][4], const char* values,
                                          float (&out)[kD / 8][4]) {
    using Layout = SharedVectors<T, kD>;
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int k = 0; k < kN; k += 16) {
      const float (&low)[4] = weights[k / 8];
      const float (&high)[4] = weights[k / 8 + 1];
      const uint32_t a[4] = {pack_two(T{}, low[0], low[1]), pack_two(T{}, low[2], low[3]),
                             pack_two(T{}, high[0], high[1]), pack_two(T{}, high[2], high[3])};
#pragma unroll
      for (int n = 0; n < kD; n += 16) {
        uint32_t b[4];
        load_matrices<true>(b, Layout::at(values, k + lane % 16, n + lane / 16 * 8));
        multiply_add(T{}, out[n / 8], a, b[0], b[1]);
        multiply_add(T{}, out[n / 8 + 1], a, b[2], b[3]);
      }
    }
  }
};

}  // namespace ear_ops::cuda
