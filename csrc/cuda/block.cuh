// Sums over a block of threads, and accesses to rows of tensors of 16 bytes or one element at a time.
#pragma once

#include "primitives.cuh"

namespace ear_ops::cuda {

// The sum over all kThreads threads, in thread 0. Uses the first bytes of shared memory.
template <int kThreads>
EAR_OPS_DEVICE float block_sum(float value) {
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) value += shuffle_xor(value, lanes);
  sync_block();  // what lay there before may still be read
  if (thread_index() % kWarp == 0) store_shared(shared_memory() + thread_index() / kWarp * 4, value);
  sync_block();
  value = 0;
  if (thread_index() == 0)
    for (int warp = 0; warp < kThreads / kWarp; ++warp) value += load_shared<float>(shared_memory() + warp * 4);
  return value;
}

// What one access moves: neighbouring elements of a row.
template <typename T, int kCount = 16 / sizeof(T)>
struct alignas(kCount * sizeof(T)) Pack {
  T elements[kCount];
};

template <typename T>
EAR_OPS_CONSTANT int pack_size() {
  return 16 / sizeof(T);
}

// Loads a pack in one access, or, where rows do not allow it, `n` elements `stride` apart and zeros after them. So
// which thread gets which elements, and the order of sums, does not depend on how rows lie in memory.
template <bool kVectorized, typename T, int kCount>
EAR_OPS_DEVICE void load_pack(const T* from, int64_t stride, int n, Pack<T, kCount>* to) {
  if constexpr (kVectorized) {
    *to = load_global(reinterpret_cast<const Pack<T, kCount>*>(from));
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) to->elements[e] = e < n ? load_global(from + e * stride) : T{};
  }
}

template <bool kVectorized, typename T, int kCount>
EAR_OPS_DEVICE void store_pack(T* to, int n, const Pack<T, kCount>& from) {
  if constexpr (kVectorized) {
    store_global(reinterpret_cast<Pack<T, kCount>*>(to), from);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e)
      if (e < n) store_global(to + e, from.elements[e]);
  }
}

}  // namespace ear_ops::cuda
