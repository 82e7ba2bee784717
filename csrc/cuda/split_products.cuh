// Matrix products of floats. The matrix unit takes no floats; it takes float16, whose products it makes exactly. So a
// float is split into the sum of two float16, of 11 bits of significand each, and a product into three. The product of
// the two small parts is left out: it is at most 2^-22 of the whole.
//
// float16 has few exponents. Each vector therefore has a power of two of its own, which brings its largest feature into
// their range. A feature x is then exact to 2^-23 |x| or 2^-38 of the largest, whichever is more. So digits are lost
// where the features of a vector differ in size by more than some 2^14, and the small ones matter nevertheless. The
// same holds of the vectors of a tile that are weighted and summed.
//
//   in shared memory, kD features    float ... float ... | 16 bytes of padding
//     | split
//   in the same place                large [kD] float16, small [kD] float16 | inverse of the power of two
//
// The unit rounds its sums towards zero, which would add up over many steps. So each step of 16 starts from nothing,
// and its result is added with proper rounding.
#pragma once

#include "products.cuh"

namespace ear_ops::cuda {

constexpr float kLargestPower = 1.7014118346046923e38f;  // 2^127

// A power of two, and 1 over it.
struct PowerOfTwo {
  float value, inverse;
};

// The one that brings `largest`, which is not negative, to 2^13 or more and below 2^14; as near as floats have it.
EAR_OPS_DEVICE PowerOfTwo into_range(float largest) {
  const int wanted = 127 + 127 + 13 - static_cast<int>(float_as_bits(largest) >> 23);  // a float's field of exponents
  const int field = wanted > 253 ? 253 : wanted;                                       // at least 12
  return {bits_as_float(static_cast<uint32_t>(field) << 23), bits_as_float(static_cast<uint32_t>(254 - field) << 23)};
}

template <>
struct Products<float> {
  static constexpr bool kSplit = true;

  struct Pair {  // two floats, each the sum of two float16
    uint32_t large, small;
    EAR_OPS_DEVICE Pair(float first, float second) : large(pack_two(float16{}, first, second)) {
      const float16 low{static_cast<uint16_t>(large)}, high{static_cast<uint16_t>(large >> 16)};
      small = pack_two(float16{}, first - to_float(low), second - to_float(high));
    }
  };

  // Splits kVectors vectors where they lie. Eight lanes take a vector, so that a warp takes four at a time: of eight
  // the vectors 0, 4, 1 and 5, which lie in different banks.
  template <int kD, int kVectors, int kWarps>
  static EAR_OPS_DEVICE void split(char* vectors) {
    using Layout = SharedVectors<float, kD>;
    struct alignas(16) Four {
      float numbers[4];
    };
    struct alignas(8) Two {
      uint32_t words[2];
    };
    constexpr int kParts = kD / 32;
    // Vectors of a lane at a time: so many that they hide the time of the exchange, so few that registers hold them.
    constexpr int kAtOnce = kD > 96 ? 1 : kD > 64 || kVectors < kWarps * 16 ? 2 : 4;
    const int lane = thread_index() % kWarp, part = lane % 8 * 4;
    const int of_warp = kAtOnce == 1 ? lane / 8 : lane / 8 % 2 * 4 + lane / 16;
    char* vector = vectors + Layout::bytes(thread_index() / kWarp * kAtOnce * 4 + of_warp);
#pragma unroll 1
    for (int first = 0; first < kVectors;
         first += kWarps * kAtOnce * 4, vector += Layout::bytes(kWarps * kAtOnce * 4)) {
      static_assert(kVectors % (kWarps * kAtOnce * 4) == 0, "every warp has as much to do");
      Four features[kAtOnce][kParts];
      PowerOfTwo power[kAtOnce];
      float largest[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          features[i][p] = load_shared<Four>(vector + Layout::offset(i / 2 * 8 + i % 2 * 2, part + 32 * p));
#pragma unroll
          for (int e = 0; e < 4; ++e) largest[i] = fmaxf(largest[i], fabsf(features[i][p].numbers[e]));
        }
#pragma unroll
      for (int lanes = 1; lanes < 8; lanes *= 2)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) largest[i] = fmaxf(largest[i], shuffle_xor(largest[i], lanes));
      sync_warp();
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        power[i] = into_range(largest[i]);
        char* to = vector + Layout::bytes(i / 2 * 8 + i % 2 * 2);
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          float (&numbers)[4] = features[i][p].numbers;
#pragma unroll
          for (int e = 0; e < 4; ++e) numbers[e] *= power[i].value;
          const Pair low(numbers[0], numbers[1]), high(numbers[2], numbers[3]);
          store_shared(to + (part + 32 * p) * 2, Two{{low.large, high.large}});
          store_shared(to + (part + 32 * p + kD) * 2, Two{{low.small, high.small}});
        }
        if (part == 0) store_shared(to + kD * 4, power[i].inverse);
      }
    }
  }

  // c [16, 8] += a b, each of a large and a small part. kSwapped: the keys are the owned ones; the cross terms change
  // places with them, so that the same bits come out.
  template <bool kSwapped>
  static EAR_OPS_DEVICE void multiply(float (&c)[4], const uint32_t (&large)[4], const uint32_t (&small)[4],
                                      const uint32_t* b_large, const uint32_t* b_small) {
    if (!kSwapped) multiply_add(float16{}, c, small, b_large[0], b_large[1]);
    multiply_add(float16{}, c, large, b_small[0], b_small[1]);
    if (kSwapped) multiply_add(float16{}, c, small, b_large[0], b_large[1]);
    multiply_add(float16{}, c, large, b_large[0], b_large[1]);
  }

  // scores [16, kN] += owned [16, kD] visited [kN, kD]^T, all split
  template <int kD, int kN, bool kSwapped>
  static EAR_OPS_DEVICE void add_scores(const char* owned, const char* visited, float (&scores)[kN / 8][4]) {
    using Layout = SharedVectors<float, kD>;
    constexpr int kSmall = kD * 2;  // bytes from the large parts to the small ones
    const int lane = thread_index() % kWarp;
    const float of_owned[2] = {load_shared<float>(Layout::at(owned, lane / 4, kD)),
                               load_shared<float>(Layout::at(owned, lane / 4 + 8, kD))};
    const char* a = owned + Layout::bytes(lane % 16) + lane / 16 * 16;
    const char* b = visited + Layout::bytes(lane / 16 * 8 + lane % 8) + lane / 8 % 2 * 16;
    float sums[kN / 8][4] = {};
#pragma unroll 1
    for (int k = 0; k < kD; k += 16) {
      uint32_t large[4], small[4];
      load_matrices<false>(large, a + k * 2);
      load_matrices<false>(small, a + k * 2 + kSmall);
#pragma unroll
      for (int n = 0; n < kN; n += 16) {
        uint32_t b_large[4], b_small[4];
        load_matrices<false>(b_large, b + Layout::bytes(n) + k * 2);
        load_matrices<false>(b_small, b + Layout::bytes(n) + k * 2 + kSmall);
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          float step[4] = {};
          multiply<kSwapped>(step, large, small, b_large + 2 * eight, b_small + 2 * eight);
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[n / 8 + eight][e] += step[e];
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float of_visited = load_shared<float>(Layout::at(visited, n * 8 + lane % 4 * 2 + e % 2, kD));
        // Never infinity, which times 0 would be NaN.
        scores[n][e] += sums[n][e] * fminf(of_owned[e / 2] * of_visited, kLargestPower);
      }
  }

  // out [16, kD] += weights [16, kN] values [kN, kD], of values that are split
  template <int kD, int kN>
  static EAR_OPS_DEVICE void add_weighted(const float (&weights)[kN / 8][4], const char* values,
                                          float (&out)[kD / 8][4]) {
    using Layout = SharedVectors<float, kD>;
    constexpr int kSmall = kD * 2;
    const int lane = thread_index() % kWarp;
    float scaled[kN / 8][4], largest[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scaled[n][e] = weights[n][e] * load_shared<float>(Layout::at(values, n * 8 + lane % 4 * 2 + e % 2, kD));
        largest[e / 2] = fmaxf(largest[e / 2], fabsf(scaled[n][e]));
      }
    PowerOfTwo power[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = fmaxf(largest[half], shuffle_xor(largest[half], 1));
      power[half] = into_range(fmaxf(largest[half], shuffle_xor(largest[half], 2)));
    }
    const char* b = values + Layout::bytes(lane % 16) + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kN; k += 16) {
      uint32_t large[4], small[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&two)[4] = scaled[k / 8 + i / 2];
        const int half = i % 2;
        const Pair pair(two[2 * half] * power[half].value, two[2 * half + 1] * power[half].value);
        large[i] = pair.large, small[i] = pair.small;
      }
#pragma unroll
      for (int n = 0; n < kD; n += 16) {
        uint32_t b_large[4], b_small[4];
        load_matrices<true>(b_large, b + Layout::bytes(k) + n * 2);
        load_matrices<true>(b_small, b + Layout::bytes(k) + n * 2 + kSmall);
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          if (kD > 96) sync_warp();  // the results of more loads at a time would need more registers than there are
          float step[4] = {};
          multiply<false>(step, large, small, b_large + 2 * eight, b_small + 2 * eight);
#pragma unroll
          for (int e = 0; e < 4; ++e) out[n / 8 + eight][e] += step[e] * power[e / 2].inverse;
        }
      }
    }
  }
};

}  // namespace ear_ops::cuda
