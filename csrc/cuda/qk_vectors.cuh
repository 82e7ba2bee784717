// Queries and keys of both views: which of them take part, how their vectors come into shared memory, and which queries
// may attend to which keys.
//
// A block of threads owns kOwned vectors of one role and visits those of the other role, kVisited at a time. Where it
// owns queries it visits keys, and the other way round.
#pragma once

#include "products.cuh"
#include "qk_args.h"

namespace ear_ops::cuda {

constexpr int kThreads = 128;  // of a block: four warps, that own 16 vectors each
constexpr int kVisited = 64;   // vectors of a tile that a block visits, at most

enum class Role { kQueries, kKeys };

// The vectors of one role in one pair and head.
template <Role kRole>
struct Vectors {
  const QKArgs& args;
  int64_t pair;
  int head;

  EAR_OPS_DEVICE int count() const { return kRole == Role::kQueries ? args.queries : args.keys; }
  EAR_OPS_DEVICE const HeadsPointer& pointer(int v) const {
    return kRole == Role::kQueries ? args.query[v] : args.key[v];
  }
  // Whether a vector takes part: a query that counts, a key that is real in this view.
  EAR_OPS_DEVICE bool real(int v, int index) const {
    if (index >= count()) return false;
    const uint8_t* mask = kRole == Role::kQueries ? args.counted_queries : args.key_mask;
    const int64_t first = kRole == Role::kQueries ? pair : v * args.pairs + pair;
    return !mask || load_global(mask + first * count() + index);
  }
  EAR_OPS_DEVICE const char* address(int v, int index, int feature, int element_bytes) const {
    const HeadsPointer& of = pointer(v);
    const int64_t offset =
        pair * of.strides.batch + head * of.strides.head + index * of.strides.row + feature * of.strides.column;
    return static_cast<const char*>(of.data) + offset * element_bytes;
  }
};

// Which of the vectors [first, first + kN) take part, a bit each. Every warp works it out for itself.
template <int kN>
struct Real {
  uint32_t words[2][(kN + 31) / 32];

  template <Role kRole>
  EAR_OPS_DEVICE Real(const Vectors<kRole>& vectors, int first) {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int w = 0; w < (kN + 31) / 32; ++w) words[v][w] = ballot(vectors.real(v, first + w * 32 + lane));
  }
  EAR_OPS_DEVICE bool any() const {
    uint32_t all = 0;
#pragma unroll
    for (int w = 0; w < (kN + 31) / 32; ++w) all |= words[0][w] | words[1][w];
    return all != 0;
  }
  // Of vector `of_eight` of the n-th eight.
  EAR_OPS_DEVICE bool operator()(int v, int n, int of_eight) const {
    return words[v][n / 4] >> (n % 4 * 8 + of_eight) & 1;
  }
};

// Copies the features [feature, feature + kD) of kCount vectors of both views into shared memory, where those that do
// not take part are zero.
template <typename T, int kD, int kCount, Role kRole>
EAR_OPS_DEVICE void copy_vectors(char* to, const Vectors<kRole>& vectors, int first, int feature) {
  using Layout = SharedVectors<T, kD>;
  constexpr int kElements = 16 / sizeof(T), kAccesses = kD / kElements, kBytes = sizeof(T);
  const int dim = vectors.args.dim;
#pragma unroll
  for (int v = 0; v < 2; ++v, to += Layout::bytes(kCount)) {
    if (vectors.args.vectorized) {
#pragma unroll 1  // each copy is short and none is waited for: unrolled, their addresses take registers from the scores
      for (int i = thread_index(); i < kCount * kAccesses; i += kThreads) {
        const int n = i / kAccesses, c = i % kAccesses * kElements;
        const bool there = vectors.real(v, first + n) && feature + c < dim;
        copy_async<16>(to + n * Layout::kVectorBytes + c * kBytes,
                       there ? vectors.address(v, first + n, feature + c, kBytes) : vectors.pointer(v).data, there);
      }
    } else {
#pragma unroll 1
      for (int i = thread_index(); i < kCount * kD; i += kThreads) {
        const int n = i / kD, c = i % kD;
        T value{};
        if (vectors.real(v, first + n) && feature + c < dim)
          value = load_global(reinterpret_cast<const T*>(vectors.address(v, first + n, feature + c, kBytes)));
        store_shared(to + n * Layout::kVectorBytes + c * kBytes, value);
      }
    }
  }
}

// The masks that depend on positions alone, aligned to the bottom right.
struct Structure {
  int shift, window;
  bool is_causal;

  EAR_OPS_DEVICE explicit Structure(const QKArgs& a)
      : shift(a.keys - a.queries), window(a.window), is_causal(a.is_causal) {}
  EAR_OPS_DEVICE bool allows(int query, int key) const {
    const int behind = query + shift - key;
    return !(is_causal && behind < 0) && !(window && (behind >= window || -behind >= window));
  }
  // Whether any of the queries [query, query + rows) may attend to any of the keys [key, key + columns).
  EAR_OPS_DEVICE bool allows_any(int query, int rows, int key, int columns) const {
    const int most = query + rows - 1 + shift - key, least = query + shift - (key + columns - 1);  // positions behind
    return !(is_causal && most < 0) && !(window && (least >= window || -most >= window));
  }
};

}  // namespace ear_ops::cuda
