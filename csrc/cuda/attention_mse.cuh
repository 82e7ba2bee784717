// Compares attention probabilities that exist, in one pass over both maps.
//
//   global memory   P [S] and T [S] of one row, masks
//                     | 16 bytes each at a time, or element by element where rows do not allow it
//   registers       p - t of 4 or 8 neighbouring keys, masked ones being 0
//                     | squared and summed, over the block of threads through shared memory
//   written         forward: block_sums, one for about 16 Ki elements of a head
//                   backward: 2 g (p - t) and its negative, 16 bytes at a time, contiguous
#pragma once

#include "attention_mse_args.h"
#include "block.cuh"

namespace ear_ops::cuda {

constexpr int kMapsThreads = 256;

template <typename T>
struct MapsPack {
  Pack<T> value[2];
  Pack<uint8_t, pack_size<T>()> real[2];

  // The difference of the e-th elements; a padded key has probability 0.
  EAR_OPS_DEVICE float difference(int e) const {
    const float p = real[0].elements[e] ? to_float(value[0].elements[e]) : 0.0f;
    const float t = real[1].elements[e] ? to_float(value[1].elements[e]) : 0.0f;
    return p - t;
  }
};

// Calls body(offset in the contiguous rows of this pair and head, elements of the row from there on, counted, pack) for
// every pack of the rows of a block of threads.
template <typename T, bool kVectorized, typename Body>
EAR_OPS_DEVICE void for_packs(const MapsArgs& a, int64_t pair, int head, int block, const Body& body) {
  constexpr int kCount = pack_size<T>();
  const int packs = (a.keys + kCount - 1) / kCount, first = block * a.rows_per_block;
  const int rows = a.queries - first < a.rows_per_block ? a.queries - first : a.rows_per_block;
#pragma unroll kVectorized ? 2 : 1  // accesses in flight; more cost registers that run out
  for (int i = thread_index(); i < rows * packs; i += kMapsThreads) {
    const int row = first + i / packs, column = i % packs * kCount, left = a.keys - column;
    const bool counted = !a.counted_queries || load_global(a.counted_queries + pair * a.queries + row);
    MapsPack<T> pack{};
    if (counted) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const Strides& s = a.attn[v].strides;
        const T* from = static_cast<const T*>(a.attn[v].data) + pair * s.batch + head * s.head + row * s.row;
        load_pack<kVectorized>(from + column * s.column, s.column, left, &pack.value[v]);
        if (a.key_mask) {
          load_pack<kVectorized>(a.key_mask + (v * a.pairs + pair) * a.keys + column, 1, left, &pack.real[v]);
        } else {
#pragma unroll
          for (int e = 0; e < kCount; ++e) pack.real[v].elements[e] = 1;
        }
      }
    }
    body(static_cast<int64_t>(row) * a.keys + column, left, counted, pack);
  }
}

template <typename T, bool kVectorized>
EAR_OPS_KERNEL(kMapsThreads, 1)
maps_forward(EAR_OPS_ARGUMENT const MapsArgs a) {
  const int blocks = (a.queries + a.rows_per_block - 1) / a.rows_per_block;
  const int block = block_index() % blocks, head = block_index() / blocks % a.heads;
  const int64_t pair = block_index() / blocks / a.heads;
  float total = 0;
  for_packs<T, kVectorized>(a, pair, head, block, [&](int64_t, int, bool counted, const auto& pack) {
    if (!counted) return;
    float sum = 0;
#pragma unroll
    for (int e = 0; e < pack_size<T>(); ++e) sum += pack.difference(e) * pack.difference(e);
    total += sum;
  });
  total = block_sum<kMapsThreads>(total);
  if (thread_index() == 0) store_global(a.block_sums + block_index(), total);
}

template <typename T, bool kVectorized>
EAR_OPS_KERNEL(kMapsThreads, 1)
maps_backward(EAR_OPS_ARGUMENT const MapsArgs a) {
  constexpr int kCount = pack_size<T>();
  const int blocks = (a.queries + a.rows_per_block - 1) / a.rows_per_block;
  const int block = block_index() % blocks, head = block_index() / blocks % a.heads;
  const int64_t pair = block_index() / blocks / a.heads;
  const float upstream = 2 * load_global(a.grad_sums + pair * a.heads + head);
  for_packs<T, kVectorized>(a, pair, head, block, [&](int64_t offset, int left, bool counted, const auto& pack) {
    offset += (pair * a.heads + head) * static_cast<int64_t>(a.queries) * a.keys;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (!a.attn[v].gradient) continue;
      Pack<T> gradient;
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        const float value = (v == 0 ? upstream : -upstream) * pack.difference(e);
        round_to(counted && pack.real[v].elements[e] ? value : 0.0f, &gradient.elements[e]);
      }
      store_pack<kVectorized>(static_cast<T*>(a.attn[v].gradient) + offset, left, gradient);
    }
  });
}

}  // namespace ear_ops::cuda
