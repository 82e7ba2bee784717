// Matrix products of one warp over vectors in shared memory, in the fragments of m16n8: lane l = 4 g + t holds of a
// 16 x 8 product the elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#pragma once

#include "primitives.cuh"

namespace ear_ops::cuda {

// How vectors of kD features lie in shared memory. The padding spreads those that are read together over all banks.
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
struct Products {  // 16-bit elements
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

// A float is the sum of two numbers that the matrix unit takes, of 11 bits of significand each. The product of the two
// small ones is below the rounding of the sum and left out. The unit rounds its sums towards zero, which would add up
// over many steps: so each step starts from nothing, and its result is added with proper rounding. kSwapped: the keys
// are the owned ones; the cross terms change places with them, so that the same bits come out. The summation index is
// permuted to suit the loads.
template <>
struct Products<float> {
  struct Split {
    uint32_t large, small;
    EAR_OPS_DEVICE explicit Split(float x) : large(round_to_tf32(x)), small(round_to_tf32(x - bits_as_float(large))) {}
  };

  template <bool kSwapped = false>
  static EAR_OPS_DEVICE void multiply(float (&c)[4], const Split (&a)[4], const Split& b0, const Split& b1) {
    const uint32_t large[4] = {a[0].large, a[1].large, a[2].large, a[3].large};
    const uint32_t small[4] = {a[0].small, a[1].small, a[2].small, a[3].small};
    float step[4] = {0, 0, 0, 0};
    if (!kSwapped) multiply_add(float{}, step, small, b0.large, b1.large);
    multiply_add(float{}, step, large, b0.small, b1.small);
    if (kSwapped) multiply_add(float{}, step, small, b0.large, b1.large);
    multiply_add(float{}, step, large, b0.large, b1.large);
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += step[i];
  }

  struct Two {
    float first, second;
  };

  template <int kD, int kN, bool kSwapped>
  static EAR_OPS_DEVICE void add_scores(const char* owned, const char* visited, float (&scores)[kN / 8][4]) {
    using Layout = SharedVectors<float, kD>;
    const int g = thread_index() % kWarp / 4, t = thread_index() % 4;
    // The lanes of a step read features 0 to 3 and 16 to 19 of 32, which lie in different banks for all vectors.
    const int of_lane = t / 2 * 16 + t % 2 * 2;
#pragma unroll 1  // more at a time and the split numbers run out of registers
    for (int step = 0; step < kD; step += 8) {
      const int k = step / 32 * 32 + step % 32 / 2 + of_lane;
      const Two top = load_shared<Two>(Layout::at(owned, g, k));
      const Two bottom = load_shared<Two>(Layout::at(owned, g + 8, k));
      const Split a[4] = {Split(top.first), Split(bottom.first), Split(top.second), Split(bottom.second)};
#pragma unroll
      for (int n = 0; n < kN; n += 8) {
        const Two b = load_shared<Two>(Layout::at(visited, n + g, k));
        multiply<kSwapped>(scores[n / 8], a, Split(b.first), Split(b.second));
      }
    }
  }

  template <int kD, int kN>
  static EAR_OPS_DEVICE void add_weighted(const float (&weights)[kN / 8][4], const char* values,
                                          float (&out)[kD / 8][4]) {
    using Layout = SharedVectors<float, kD>;
    const int g = thread_index() % kWarp / 4, t = thread_index() % 4;
#pragma unroll
    for (int k = 0; k < kN; k += 8) {
      const float (&w)[4] = weights[k / 8];  // a lane's 2t, 2t + 1 stand for the unit's t, t + 4
      const Split a[4] = {Split(w[0]), Split(w[2]), Split(w[1]), Split(w[3])};
#pragma unroll
      for (int n = 0; n < kD; n += 8) {
        const Split b0(load_shared<float>(Layout::at(values, k + 2 * t, n + g)));
        const Split b1(load_shared<float>(Layout::at(values, k + 2 * t + 1, n + g)));
        multiply(out[n / 8], a, b0, b1);
      }
    }
  }
};

}  // namespace ear_ops::cuda
