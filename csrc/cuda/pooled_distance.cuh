// Compares the masked means of two views. A block of threads pools a slice of the features over all tokens.
//
//   global memory   x and x^a, [L, C]: a slice of the features, 8 accesses of 16 bytes side by side
//                     | 32 tokens at a time, four times ahead; padded tokens are not read
//   registers       compensated sums of this thread's features and tokens
//                     | through shared memory
//   registers       one thread for each feature: mean - mean_a, squared and summed over the block
//   written         forward: difference [B, C]; block_sums, one for each slice
//                   backward: 2 g difference / tokens at every real token, zeros elsewhere
#pragma once

#include "block.cuh"
#include "pooled_distance_args.h"

namespace ear_ops::cuda {

constexpr int kPooledThreads = 256;
constexpr int kPooledLanes = 8;                               // accesses side by side
constexpr int kPooledTokens = kPooledThreads / kPooledLanes;  // tokens at a time

// A sum that keeps what rounding takes away from it.
struct Compensated {
  float sum = 0, rest = 0;

  EAR_OPS_DEVICE void add(float x) {  // Neumaier
    const float next = sum + x;
    rest += fabsf(sum) >= fabsf(x) ? (sum - next) + x : (x - next) + sum;
    sum = next;
  }
  EAR_OPS_DEVICE double value() const { return static_cast<double>(sum) + (sum - sum == 0 ? rest : 0.0f); }
};

// Where a block works: a pair and the first feature of its slice, and of this thread.
template <typename T>
struct PooledPlace {
  static constexpr int kCount = pack_size<T>();
  static constexpr int kSlice = kPooledLanes * kCount;
  int slices, slice;
  int64_t pair;

  EAR_OPS_DEVICE explicit PooledPlace(const PooledArgs& a)
      : slices((a.features + kSlice - 1) / kSlice), slice(block_index() % slices), pair(block_index() / slices) {}
  EAR_OPS_DEVICE int feature() const { return slice * kSlice + thread_index() % kPooledLanes * kCount; }
  EAR_OPS_DEVICE int token() const { return thread_index() / kPooledLanes; }
};

EAR_OPS_DEVICE bool is_real(const PooledArgs& a, int v, int64_t pair, int token) {
  return token < a.length && (!a.mask || load_global(a.mask + (v * a.pairs + pair) * a.length + token));
}

// How many real tokens a sequence has, at least 1. Every thread gets the number.
EAR_OPS_DEVICE float token_count(const PooledArgs& a, int v, int64_t pair) {
  if (!a.mask) return static_cast<float>(a.length > 0 ? a.length : 1);
  float count = 0;
  for (int token = thread_index(); token < a.length; token += kPooledThreads) count += is_real(a, v, pair, token);
  count = block_sum<kPooledThreads>(count);
  if (thread_index() == 0) store_shared(shared_memory(), count);
  sync_block();
  count = load_shared<float>(shared_memory());
  sync_block();
  return count > 0 ? count : 1.0f;
}

template <typename T>
EAR_OPS_CONSTANT int pooled_shared_bytes() {  // the sums of both views, and at least what block_sum takes
  return 2 * kPooledThreads * pack_size<T>() * static_cast<int>(sizeof(Compensated));
}

template <typename T, bool kVectorized>
EAR_OPS_KERNEL(kPooledThreads, 1)
pooled_forward(EAR_OPS_ARGUMENT const PooledArgs a) {
  using Place = PooledPlace<T>;
  constexpr int kCount = Place::kCount, kAhead = 4;
  const Place place(a);
  float count[2];
#pragma unroll
  for (int v = 0; v < 2; ++v) count[v] = token_count(a, v, place.pair);
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    Compensated sums[kCount];
    const HiddenPointer& hidden = a.hidden[v];
    const T* from =
        static_cast<const T*>(hidden.data) + place.pair * hidden.batch_stride + place.feature() * hidden.feature_stride;
    if (place.feature() < a.features)
      for (int token = place.token(); token < a.length; token += kAhead * kPooledTokens) {
        Pack<T> packs[kAhead];
        bool real[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          real[i] = is_real(a, v, place.pair, token + i * kPooledTokens);
          if (real[i])
            load_pack<kVectorized>(from + (token + i * kPooledTokens) * hidden.token_stride, hidden.feature_stride,
                                   a.features - place.feature(), &packs[i]);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
          if (real[i])
#pragma unroll
            for (int e = 0; e < kCount; ++e) sums[e].add(to_float(packs[i].elements[e]));
      }
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      store_shared(shared_memory() + ((v * kPooledThreads + thread_index()) * kCount + e) * sizeof(Compensated),
                   sums[e]);
  }
  sync_block();
  float squared = 0;
  const int feature = place.slice * Place::kSlice + thread_index();
  if (thread_index() < Place::kSlice && feature < a.features) {
    double mean[2];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      double total = 0;
      for (int token = 0; token < kPooledTokens; ++token)
        total += load_shared<Compensated>(shared_memory() +
                                          (v * kPooledThreads * kCount + token * Place::kSlice + thread_index()) *
                                              sizeof(Compensated))
                     .value();
      mean[v] = total / count[v];
    }
    const float difference = static_cast<float>(mean[0] - mean[1]);
    store_global(a.difference + place.pair * a.features + feature, difference);
    squared = difference * difference;
  }
  squared = block_sum<kPooledThreads>(squared);
  if (thread_index() == 0) store_global(a.block_sums + block_index(), squared);
}

// Every real token of a sequence has the same gradient.
template <typename T, bool kVectorized>
EAR_OPS_KERNEL(kPooledThreads, 1)
pooled_backward(EAR_OPS_ARGUMENT const PooledArgs a) {
  using Place = PooledPlace<T>;
  constexpr int kCount = Place::kCount;
  const Place place(a);
  const float upstream = 2 * load_global(a.grad_sums + place.pair);
  for (int v = 0; v < 2; ++v) {
    if (!a.hidden[v].gradient) continue;
    const float factor = (v == 0 ? upstream : -upstream) / token_count(a, v, place.pair);
    if (place.feature() >= a.features) continue;
    Pack<T> gradient{};
    const int left = a.features - place.feature();
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e < left)
        round_to(factor * load_global(a.difference + place.pair * a.features + place.feature() + e),
                 &gradient.elements[e]);
    T* to = static_cast<T*>(a.hidden[v].gradient) + place.pair * a.length * a.features + place.feature();
    for (int token = place.token(); token < a.length; token += kPooledTokens) {
      const bool real = is_real(a, v, place.pair, token);
      Pack<T> out;
#pragma unroll
      for (int e = 0; e < kCount; ++e) out.elements[e] = real ? gradient.elements[e] : T{};
      store_pack<kVectorized>(to + static_cast<int64_t>(token) * a.features, left, out);
    }
  }
}

}  // namespace ear_ops::cuda
