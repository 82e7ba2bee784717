// Queries and keys of both views: which of them take part, how their vectors come into shared memory, and which queries
// may attend to which keys.
//
// A block of threads owns kOwned vectors of one role and visits those of the other role, kVisited at a time. Where it
// owns queries it visits keys, and the other way round.
#pragma once

#include "qk_args.h"
#include "split_products.cuh"

namespace ear_ops::cuda {

constexpr int kThreads = 128;  // of a block that owns kOwned vectors: four warps, that own 16 vectors each
constexpr int kVisited = 64;   // vectors of a tile that a block visits, at most

enum class Role { kQueries, kKeys };

// The vectors of one role in one pair and head. Where a block works on one view alone (mean_args.h), that is view 0.
template <Role kRole>
struct Vectors {
  const QKArgs& args;
  int64_t pair;
  int head;

  EAR_OPS_DEVICE int count() const { return kRole == Role::kQueries ? args.queries : args.keys; }
  EAR_OPS_DEVICE const HeadsPointer& pointer(int v) const {
    return kRole == Role::kQueries ? args.query[v] : args.key[v];
  }
  EAR_OPS_DEVICE bool masked() const {
    return (kRole == Role::kQueries ? args.counted_queries : args.key_mask) != nullptr;
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
template <int kN, int kViews = 2>
struct Real {
  uint32_t words[kViews][(kN + 31) / 32];

  template <Role kRole>
  EAR_OPS_DEVICE Real(const Vectors<kRole>& vectors, int first) {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int v = 0; v < kViews; ++v)
#pragma unroll
      for (int w = 0; w < (kN + 31) / 32; ++w)
        words[v][w] = ballot((kN >= 32 || lane < kN) && vectors.real(v, first + w * 32 + lane));
  }
  EAR_OPS_DEVICE Real() {}
  // Of the vectors [index * kPart, (index + 1) * kPart) among these. Words are chosen, for registers have no index.
  template <int kPart>
  EAR_OPS_DEVICE Real<kPart, kViews> tile(int index) const {
    static_assert(kPart % 32 == 0, "a part is made of whole words");
    Real<kPart, kViews> part;
#pragma unroll
    for (int v = 0; v < kViews; ++v)
#pragma unroll
      for (int w = 0; w < kPart / 32; ++w) {
        part.words[v][w] = words[v][w];
#pragma unroll
        for (int other = 1; other < kN / kPart; ++other)
          if (index == other) part.words[v][w] = words[v][other * (kPart / 32) + w];
      }
    return part;
  }
  EAR_OPS_DEVICE bool any(int v) const {
    uint32_t all = 0;
#pragma unroll
    for (int w = 0; w < (kN + 31) / 32; ++w) all |= words[v][w];
    return all != 0;
  }
  EAR_OPS_DEVICE bool any() const { return any(0) || (kViews == 2 && any(kViews - 1)); }
  EAR_OPS_DEVICE bool full() const {
    uint32_t all = ~0u;
#pragma unroll
    for (int w = 0; w < (kN + 31) / 32; ++w) all &= words[0][w] & words[kViews - 1][w];
    return all == ~0u >> (kN < 32 ? 32 - kN : 0);
  }
  // Of vector `of_eight` of the n-th eight.
  EAR_OPS_DEVICE bool operator()(int v, int n, int of_eight) const {
    return words[v][n / 4] >> (n % 4 * 8 + of_eight) & 1;
  }
};

// Copies the features [feature, feature + kD) of kCount vectors of all views into shared memory, and zeros for those
// that do not exist. Masks are not asked, so that no copy waits for one.
template <typename T, int kD, int kCount, int kThreads, int kViews = 2, Role kRole>
EAR_OPS_DEVICE void copy_vectors(char* to, const Vectors<kRole>& vectors, int first, int feature) {
  using Layout = SharedVectors<T, kD>;
  constexpr int kElements = 16 / sizeof(T), kAccesses = kD / kElements, kBytes = sizeof(T);
  constexpr int kPass = kThreads / kAccesses;  // vectors that the block copies at a time
  const int exist = vectors.count() - first, features = vectors.args.dim - feature;
#pragma unroll 1
  for (int v = 0; v < kViews; ++v, to += Layout::bytes(kCount)) {
    if (vectors.args.vectorized) {
      const int mine = thread_index() / kAccesses, c = thread_index() % kAccesses * kElements;
      if (kThreads % kAccesses != 0 && mine >= kPass) continue;
      const int last = c < features ? exist : 0;
      const char* from = vectors.address(v, first + mine, feature + c, kBytes);
      const int64_t step = vectors.pointer(v).strides.row * (kPass * kBytes);
#pragma unroll
      for (int n = 0; n < kCount; n += kPass, from += step)
        if (kCount % kPass == 0 || n + mine < kCount)
          copy_async<16>(to + Layout::offset(n + mine, c), from, n + mine < last);
    } else {
#pragma unroll 1
      for (int i = thread_index(); i < kCount * kD; i += kThreads) {
        const int n = i / kD, c = i % kD;
        T value{};
        if (n < exist && c < features)
          value = load_global(reinterpret_cast<const T*>(vectors.address(v, first + n, feature + c, kBytes)));
        store_shared(to + Layout::offset(n, c), value);
      }
    }
  }
}

// Zeros the vectors that take no part. A mask may hide any number, and even zero times infinity would be NaN.
template <typename T, int kD, int kCount, int kThreads, int kViews>
EAR_OPS_DEVICE void clear_hidden(char* to, const Real<kCount, kViews>& real) {
  using Layout = SharedVectors<T, kD>;
  constexpr int kElements = 16 / sizeof(T), kAccesses = kD / kElements, kWord = kCount < 32 ? kCount : 32;
#pragma unroll
  for (int v = 0; v < kViews; ++v)
#pragma unroll
    for (int first = 0; first < kCount; first += kWord, to += Layout::bytes(kWord))
#pragma unroll 1
      for (int i = thread_index(); i < kWord * kAccesses; i += kThreads)
        if (!(real.words[v][first / 32] >> (i / kAccesses) & 1))
          store_shared(to + i / kAccesses * Layout::kVectorBytes + i % kAccesses * 16, SixteenBytes{});
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
  // Whether all of the queries [query, query + rows) may attend to all of the keys [key, key + columns).
  EAR_OPS_DEVICE bool allows_all(int query, int rows, int key, int columns) const {
    const int most = query + rows - 1 + shift - key, least = query + shift - (key + columns - 1);  // positions behind
    return !(is_causal && least < 0) && !(window && (most >= window || -least >= window));
  }
  // Whether any of the queries [query, query + rows) may attend to any of the keys [key, key + columns).
  EAR_OPS_DEVICE bool allows_any(int query, int rows, int key, int columns) const {
    const int most = query + rows - 1 + shift - key, least = query + shift - (key + columns - 1);  // positions behind
    return !(is_causal && most < 0) && !(window && (least >= window || -most >= window));
  }
};

}  // namespace ear_ops::cuda
