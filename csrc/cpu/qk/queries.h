// One block of queries of one head, as operands of matrix products, and the keys that each of them may attend to.
#pragma once

#include <limits>

#include "../products.h"
#include "counted.h"
#include "keys.h"

namespace ear_ops::cpu {

constexpr int64_t kBlock = 64;  // queries of a block

// By position alone, the i-th query of a block may attend to the keys [first_key[i], last_key[i]). No query of the
// block has a key outside of [tile_begin, tile_end).
struct KeyBounds {
  int64_t tile_begin = 0, tile_end = 0;  // tile_begin is a multiple of kTile
  int64_t first_key[kBlock], last_key[kBlock];

  // Of the n queries from the first-th one on.
  template <typename Inputs>
  void bound_keys(const Inputs& inputs, const Counted& counted, int64_t first, int64_t n, int64_t padded_keys) {
    const int32_t *begin = counted.key, *end = counted.key + counted.n_keys;
    tile_begin = padded_keys, tile_end = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      int64_t& from = first_key[i] = 0;
      int64_t& until = last_key[i] = i < n ? counted.n_keys : 0;
      if (i >= n) continue;
      const int64_t position = counted.query[first + i] + inputs.keys - inputs.queries;
      if (inputs.window) from = std::lower_bound(begin, end, position - inputs.window + 1) - begin;
      if (inputs.is_causal) {
        until = std::upper_bound(begin, end, position) - begin;
      } else if (inputs.window) {
        until = std::upper_bound(begin, end, position + inputs.window - 1) - begin;
      }
      if (from >= until) {
        from = until = 0;
        continue;
      }
      tile_begin = std::min(tile_begin, from / kTile * kTile);
      tile_end = std::max(tile_end, std::min(round_up(until, kTile), padded_keys));
    }
    tile_begin = std::min(tile_begin, tile_end);
  }
};

// Between calls of load, the block holds the queries [first, first + n) of those that count. Its i-th query of view v
// is row i of as_rows(v) and column i of as_columns(v), and the rows [n, padded) are zero. Rows that lie side by side
// in the tensor are read where they lie, unless some must be padded.
template <typename P>
class QueryBlock : public KeyBounds {
 public:
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  int64_t first = 0, n = 0, padded = 0;

  QueryBlock(const QKInputs& inputs, const P& products, int64_t ld, bool backward, Arena& arena)
      : inputs_(inputs), products_(products), ld_(ld), backward_(backward) {
    const int64_t rows = round_up(std::min(inputs.queries, kBlock), P::kPadding);
    for (int v = 0; v < 2; ++v) {
      queries_[v] = arena.take<Operand>(rows * ld);
      columns_[v] = arena.take<Operand>(rows * ld);
      if constexpr (P::kInPairs) paired_[v] = arena.take<Operand>(backward * rows * ld);
    }
  }

  void load(const Counted& counted, int64_t b, int64_t head, int64_t begin, int64_t padded_keys) {
    first = begin;
    n = std::min(kBlock, counted.n_queries - begin);
    padded = round_up(n, P::kPadding);
    for (int v = 0; v < 2; ++v) {
      const char* rows = inputs_.query[v].head(b, head);
      const int64_t stride = inputs_.query[v].row_stride;
      const Operand* source = queries_[v];
      rows_ld_[v] = ld_;
      if (placed(counted)) {
        source = reinterpret_cast<const Operand*>(rows) + counted.query[begin] * stride;
        rows_ld_[v] = stride;
      } else {
        products_.gather(rows, inputs_.kind, stride, counted.query + begin, nullptr, n, padded, inputs_.dim, ld_,
                         queries_[v]);
      }
      products_.columns(source, rows_ld_[v], padded, ld_, columns_[v]);
      rows_[v] = source;
      if constexpr (P::kInPairs) {
        if (backward_) products_.pair_rows(source, rows_ld_[v], padded, ld_, paired_[v]);
        rows_[v] = paired_[v], rows_ld_[v] = ld_;
      }
    }
    bound_keys(inputs_, counted, first, n, padded_keys);
    find_alive(counted, b, head);
  }

  // Whether rows of a tensor are the block's rows as they lie.
  bool placed(const Counted& counted) const {
    return inputs_.dim == ld_ && inputs_.kind == P::kOperand && n == padded && n > 0 &&
           counted.query[first + n - 1] - counted.query[first] == n - 1;
  }

  // Right operands of products.
  const Operand* as_columns(int v) const { return columns_[v]; }  // [ld, padded]
  const Operand* as_rows(int v) const { return rows_[v]; }        // [padded, rows_ld(v)]; in the backward only
  int64_t rows_ld(int v) const { return rows_ld_[v]; }

  // [2][kLanes] of the c-th group of lanes: 0 for a query that has no key in a view, whose row is zero. Null: all have.
  const A* alive(const Counted& counted, int64_t c) const { return masked(counted) ? alive_[c] : nullptr; }

  const A* bias_row(const Counted& counted, int v, int64_t b, int64_t head, int64_t i) const {
    return reinterpret_cast<const A*>(inputs_.bias[v].head(b, head)) +
           counted.query[first + i] * inputs_.bias[v].row_stride;
  }

 private:
  const QKInputs& inputs_;
  const P& products_;
  const int64_t ld_;
  const bool backward_;
  Operand *queries_[2], *columns_[2], *paired_[2];
  const Operand* rows_[2];
  int64_t rows_ld_[2];
  alignas(64) A alive_[kBlock / kLanes][2 * kLanes];

  bool masked(const Counted& counted) const {
    return counted.masks_differ || inputs_.bias[0].data || inputs_.is_causal || inputs_.window;
  }

  void find_alive(const Counted& counted, int64_t b, int64_t head) {
    if (!masked(counted)) return;
    for (int64_t i = 0; i < kBlock; ++i)
      for (int v = 0; v < 2; ++v) {
        const A* bias = i < n && inputs_.bias[v].data ? bias_row(counted, v, b, head, i) : nullptr;
        int64_t j = first_key[i];
        for (; j < last_key[i]; ++j) {
          if (counted.masks_differ && !counted.real[v][j]) continue;
          if (!bias || bias[counted.key[j] * inputs_.bias_key_stride[v]] != -std::numeric_limits<A>::infinity()) break;
        }
        alive_[i / kLanes][v * kLanes + i % kLanes] = j < last_key[i] ? A(1) : A(0);
      }
  }
};

}  // namespace ear_ops::cpu
