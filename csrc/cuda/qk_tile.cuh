// Tiles of queries and keys of both views: who is real, how they come into shared memory, which pairs are compared.
#pragma once

#include "products.cuh"
#include "qk_args.h"

namespace ear_ops::cuda {

constexpr int kThreads = 128;  // of a block: four warps of 16 rows each
constexpr int kColumns = 64;   // at most, of a tile that a block visits

enum class Role { kQueries, kKeys };

// The rows of one role in one pair and head.
template <Role kRole>
struct Rows {
  const QKArgs& args;
  int64_t pair;
  int head;

  EAR_OPS_DEVICE int count() const { return kRole == Role::kQueries ? args.queries : args.keys; }
  EAR_OPS_DEVICE const HeadsView& view(int v) const { return kRole == Role::kQueries ? args.query[v] : args.key[v]; }
  // Whether a row takes part: a query that counts, a key that is real in this view.
  EAR_OPS_DEVICE bool real(int v, int row) const {
    if (row >= count()) return false;
    const uint8_t* mask = kRole == Role::kQueries ? args.counted_queries : args.key_mask;
    const int64_t first = kRole == Role::kQueries ? pair : v * args.pairs + pair;
    return !mask || load_global(mask + first * count() + row);
  }
  EAR_OPS_DEVICE const char* address(int v, int row, int column, int element_bytes) const {
    const HeadsView& of = view(v);
    const int64_t offset =
        pair * of.strides.batch + head * of.strides.head + row * of.strides.row + column * of.strides.column;
    return static_cast<const char*>(of.data) + offset * element_bytes;
  }
};

// Which of the columns [first, first + kN) take part, a bit each; every warp works it out for itself.
template <int kN>
struct Real {
  uint32_t words[2][(kN + 31) / 32];

  template <Role kRole>
  EAR_OPS_DEVICE Real(const Rows<kRole>& rows, int first) {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int w = 0; w < (kN + 31) / 32; ++w) words[v][w] = ballot(rows.real(v, first + w * 32 + lane));
  }
  EAR_OPS_DEVICE bool any() const {
    uint32_t all = 0;
#pragma unroll
    for (int w = 0; w < (kN + 31) / 32; ++w) all |= words[0][w] | words[1][w];
    return all != 0;
  }
  // Of column `of_eight` of the n-th eight.
  EAR_OPS_DEVICE bool operator()(int v, int n, int of_eight) const {
    return words[v][n / 4] >> (n % 4 * 8 + of_eight) & 1;
  }
};

// kRows rows of both views into shared memory, columns [column, column + kD); zeros where there is nothing real.
template <typename T, int kD, int kRows, Role kRole>
EAR_OPS_DEVICE void copy_rows(char* to, const Rows<kRole>& rows, int first, int column) {
  using Layout = Tile<T, kD>;
  constexpr int kElements = 16 / sizeof(T), kPieces = kD / kElements, kBytes = sizeof(T);
  const int dim = rows.args.dim;
#pragma unroll
  for (int v = 0; v < 2; ++v, to += Layout::bytes(kRows)) {
    if (rows.args.pieces) {
#pragma unroll 1  // each copy is short and none is waited for: unrolled, their addresses take registers from the scores
      for (int i = thread_index(); i < kRows * kPieces; i += kThreads) {
        const int row = i / kPieces, c = i % kPieces * kElements;
        const bool there = rows.real(v, first + row) && column + c < dim;
        copy_async<16>(to + row * Layout::kRowBytes + c * kBytes,
                       there ? rows.address(v, first + row, column + c, kBytes) : rows.view(v).data, there);
      }
    } else {
#pragma unroll 1
      for (int i = thread_index(); i < kRows * kD; i += kThreads) {
        const int row = i / kD, c = i % kD;
        T value{};
        if (rows.real(v, first + row) && column + c < dim)
          value = load_global(reinterpret_cast<const T*>(rows.address(v, first + row, column + c, kBytes)));
        store_shared(to + row * Layout::kRowBytes + c * kBytes, value);
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
  // Whether any of kRows queries from `query` may attend to any of `n` keys from `key`.
  EAR_OPS_DEVICE bool allows_any(int query, int rows, int key, int n) const {
    const int most = query + rows - 1 + shift - key, least = query + shift - (key + n - 1);  // positions behind
    return !(is_causal && most < 0) && !(window && (least >= window || -most >= window));
  }
};

}  // namespace ear_ops::cuda
