// What forward and backward of qk_attention_mse share: one pair's keys packed, and tiles of the scores of one block of
// queries. Scores lie transposed, [keys, queries]: a softmax runs down a column with no reduction across lanes, keys
// are multiplied where they lie in the tensor, and the products of the backward need no transposed scores.
#pragma once

#include <cstring>
#include <limits>

#include "isa.h"
#include "products.h"
#include "qk_problem.h"

namespace ear_ops::cpu {

constexpr int64_t kBlock = 64;       // queries of a block
constexpr int64_t kTile = 256;       // keys of a tile
constexpr int64_t kOneSweep = 4096;  // keys up to which a block keeps all its scores, instead of making them twice
constexpr int64_t kScoresLd =
    kBlock + kLanes;  // floats: an odd number of cache lines, so a column's keys spread over all sets

template <typename P>
class QKTask {
 public:
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  const QKProblem& problem;
  const P& products;
  const Kernels<A>& table;
  const int64_t ld;  // of packed rows

  // Of the current pair.
  int64_t n_keys = 0, n_queries = 0, columns = 0;  // what counts, and n_keys padded
  int32_t *key_index, *query_index;
  // Of the current block.
  int64_t first_query = 0, block_queries = 0, block_rows = 0, tile_begin = 0, tile_end = 0;
  A *scores[2], *queries[2], *queries_t[2];
  ColumnStats<A>* stats;  // [kBlock / kLanes]
  // Of the backward.
  A *grad_queries_t[2], *grad_queries, *grad_keys[2];

  QKTask(const QKProblem& p, const P& prod, const Kernels<A>& t, Arena& arena, bool backward)
      : problem(p), products(prod), table(t), ld(round_up(p.dim, P::kPadding)) {
    const int64_t rows = round_up(std::min(p.queries, kBlock), P::kPadding), all = round_up(p.keys, P::kPadding);
    const int64_t kept = std::min(all, backward ? kTile : kOneSweep), tile = std::min(all, kTile);
    const bool may_gather = P::kConverts || !in_place() || p.key_mask;
    key_index = arena.take<int32_t>(p.keys);
    query_index = arena.take<int32_t>(p.queries);
    stats = arena.take<ColumnStats<A>>(kBlock / kLanes);
    grad_queries = arena.take<A>(backward * rows * ld);
    for (int v = 0; v < 2; ++v) {
      real_[v] = arena.take<uint8_t>(p.key_mask ? p.keys : 0);
      scores[v] = arena.take<A>(kept * kScoresLd);
      bias_[v] = arena.take<A>(p.bias[v].data ? kept * kScoresLd : 0);
      queries[v] = arena.take<A>(rows * ld);
      queries_t[v] = arena.take<A>(rows * ld);
      gathered_[v] = arena.take<A>((P::kConverts ? tile : may_gather ? all : P::kPadding) * ld);
      keys_t_[v] = arena.take<A>(backward * (P::kConverts ? tile : all) * ld);
      grad_queries_t[v] = arena.take<A>(backward * rows * ld);
      grad_keys[v] = arena.take<A>(backward * all * ld);
      if constexpr (P::kConverts) {
        keys_left_[v] = arena.take<Operand>(all * ld);
        keys_t_left_[v] = arena.take<Operand>(backward * all * ld);
        queries_t_right_[v] = arena.take<Operand>(rows * ld);
        queries_right_[v] = arena.take<Operand>(backward * rows * ld);
      }
    }
    if constexpr (P::kConverts) {
      tile_left_ = arena.take<Operand>(backward * tile * rows);
      tile_right_ = arena.take<Operand>(backward * tile * rows);
    }
  }

  // The keys real in either view and the queries that count, and which of those keys are real in each view.
  void select(int64_t b) {
    const uint8_t* real[2] = {mask_row(problem.key_mask, b), mask_row(problem.key_mask, problem.pairs + b)};
    const uint8_t* counted = mask_row(problem.counted_queries, b);
    n_keys = n_queries = 0;
    masks_differ_ = false;
    for (int64_t j = 0; j < problem.keys; ++j) {
      if (real[0] && !real[0][j] && !real[1][j]) continue;
      if (real[0]) {
        masks_differ_ |= real[0][j] != real[1][j];
        for (int v = 0; v < 2; ++v) real_[v][n_keys] = real[v][j];
      }
      key_index[n_keys++] = static_cast<int32_t>(j);
    }
    for (int64_t i = 0; i < problem.queries; ++i)
      if (!counted || counted[i]) query_index[n_queries++] = static_cast<int32_t>(i);
    columns = round_up(n_keys, P::kPadding);
  }

  void pack_keys(int64_t b, int64_t key_head, bool transposed) {
    const bool together = n_keys > 0 && key_index[n_keys - 1] - key_index[0] == n_keys - 1;
    for (int v = 0; v < 2; ++v) {
      const char* head = problem.key[v].head(b, key_head);
      const uint8_t* real = mask_row(problem.key_mask, v * problem.pairs + b);
      auto gather = [&](int64_t first, int64_t last, int64_t padded) {  // packed keys [first, last)
        table.gather_rows(head, problem.kind, problem.key[v].row_stride, key_index + first, real, last - first, padded,
                          problem.dim, ld, gathered_[v]);
      };
      if constexpr (P::kConverts) {
        for (int64_t t = 0; t < columns; t += kTile) {
          const int64_t n = std::min(kTile, columns - t);
          gather(t, std::min(t + n, n_keys), n);
          products.left(gathered_[v], ld, n, ld, keys_left_[v] + t * ld, ld);
          if (!transposed) continue;
          table.transpose(gathered_[v], ld, n, ld, keys_t_[v], n);
          products.left(keys_t_[v], n, ld, n, keys_t_left_[v] + t, columns);
        }
      } else {
        in_tensor_[v] = 0;
        if (in_place() && together && !masks_differ_) {
          in_tensor_[v] = n_keys / P::kPadding * P::kPadding;
          tensor_ld_[v] = problem.key[v].row_stride;
          tensor_[v] = reinterpret_cast<const A*>(head) + key_index[0] * tensor_ld_[v];
        }
        gather(in_tensor_[v], n_keys, columns - in_tensor_[v]);
        if (!transposed) continue;
        table.transpose(tensor_[v], tensor_ld_[v], in_tensor_[v], ld, keys_t_[v], columns);
        table.transpose(gathered_[v], ld, columns - in_tensor_[v], ld, keys_t_[v] + in_tensor_[v], columns);
      }
    }
  }

  // Queries [begin, begin + kBlock) of those that count, and the tiles that any of them may attend to.
  void load_queries(int64_t b, int64_t head, int64_t begin, bool backward) {
    first_query = begin;
    block_queries = std::min(kBlock, n_queries - begin);
    block_rows = round_up(block_queries, P::kPadding);
    for (int v = 0; v < 2; ++v) {
      table.gather_rows(problem.query[v].head(b, head), problem.kind, problem.query[v].row_stride, query_index + begin,
                        nullptr, block_queries, block_rows, problem.dim, ld, queries[v]);
      table.transpose(queries[v], ld, block_rows, ld, queries_t[v], block_rows);
      if constexpr (P::kConverts) {
        products.right(queries_t[v], block_rows, ld, block_rows, queries_t_right_[v]);
        if (backward) products.right(queries[v], ld, block_rows, ld, queries_right_[v]);
      }
    }
    bound_keys();
    find_alive(b, head);
  }

  // Raw scores of the block against keys [t, t + n) of both views, and their bias. Keys that only pad have zero scores,
  // which no later step changes: so has their dS.
  void score(int64_t b, int64_t head, int64_t t, int64_t n) {
    for (int v = 0; v < 2; ++v) {
      if constexpr (P::kConverts) {
        products.multiply(n, block_rows, ld, keys_left_[v] + t * ld, ld, queries_t_right_[v], block_rows, scores[v],
                          kScoresLd, false);
      } else {
        const int64_t placed = std::clamp<int64_t>(in_tensor_[v] - t, 0, n);
        if (placed)
          products.multiply(placed, block_rows, ld, tensor_[v] + t * tensor_ld_[v], tensor_ld_[v], queries_t[v],
                            block_rows, scores[v], kScoresLd, false);
        if (placed < n)
          products.multiply(n - placed, block_rows, ld, gathered_[v] + (t + placed - in_tensor_[v]) * ld, ld,
                            queries_t[v], block_rows, scores[v] + placed * kScoresLd, kScoresLd, false);
      }
      if (problem.bias[v].data) load_bias(v, b, head, t, n);
    }
  }

  // kLanes of the block's queries against the real ones of the keys [t, t + n).
  Column<A> column(int64_t c, int64_t t, int64_t n) {
    Column<A> column{};
    column.ld = kScoresLd, column.keys = std::min(n, n_keys - t), column.scale = static_cast<A>(problem.scale);
    for (int v = 0; v < 2; ++v) {
      column.scores[v] = scores[v] + c * kLanes;
      if (masks_differ_) column.real[v] = real_[v] + t;
      if (problem.bias[v].data) column.bias[v] = bias_[v] + c * kLanes;
    }
    if (!problem.is_causal && !problem.window) return column;
    for (int64_t i = 0; i < kLanes; ++i) {
      first_[i] = static_cast<A>(first_key_[c * kLanes + i] - t);
      last_[i] = static_cast<A>(last_key_[c * kLanes + i] - t);
      if (first_[i] > 0 || last_[i] < column.keys) column.first = first_, column.last = last_;
    }
    return column;
  }

  const A* alive(int64_t c) const { return masked() ? alive_[c] : nullptr; }

  template <typename Body>
  void for_tiles(int64_t begin, int64_t end, const Body& body) const {  // those of the block within [begin, end)
    for (int64_t t = std::max(tile_begin, begin); t < std::min(tile_end, end); t += kTile)
      body(t, std::min(kTile, tile_end - t));
  }

  // grad_queries_t[v] (+)= K^T dS^T of the tile that `scores` holds.
  void add_grad_queries(int v, int64_t t, int64_t n, bool accumulate) {
    if constexpr (P::kConverts) {
      products.right(scores[v], kScoresLd, n, block_rows, tile_right_);
      products.multiply(ld, block_rows, n, keys_t_left_[v] + t, columns, tile_right_, block_rows, grad_queries_t[v],
                        block_rows, accumulate);
    } else {
      products.multiply(ld, block_rows, n, keys_t_[v] + t, columns, scores[v], kScoresLd, grad_queries_t[v], block_rows,
                        accumulate);
    }
  }

  // grad_keys[v] += dS^T Q of the same tile.
  void add_grad_keys(int v, int64_t t, int64_t n) {
    A* to = grad_keys[v] + t * ld;
    if constexpr (P::kConverts) {
      products.left(scores[v], kScoresLd, n, block_rows, tile_left_, block_rows);
      products.multiply(n, ld, block_rows, tile_left_, block_rows, queries_right_[v], ld, to, ld, true);
    } else {
      products.multiply(n, ld, block_rows, scores[v], kScoresLd, queries[v], ld, to, ld, true);
    }
  }

 private:
  bool masks_differ_ = false;
  uint8_t* real_[2];
  A *bias_[2], *gathered_[2], *keys_t_[2];
  Operand *keys_left_[2], *keys_t_left_[2], *queries_t_right_[2], *queries_right_[2], *tile_left_, *tile_right_;
  const A* tensor_[2] = {};  // packed keys [0, in_tensor) lie in the tensor, the others in `gathered_`
  int64_t tensor_ld_[2] = {}, in_tensor_[2] = {};
  int64_t first_key_[kBlock], last_key_[kBlock];  // packed keys that structure lets each query attend to
  alignas(64) A alive_[kBlock / kLanes][2 * kLanes];
  alignas(64) A first_[kLanes], last_[kLanes];

  // Whether rows of the tensor are operands as they are.
  bool in_place() const {
    return problem.dim == ld && problem.kind == (sizeof(A) == sizeof(double) ? Kind::kFloat64 : Kind::kFloat32);
  }
  bool masked() const { return masks_differ_ || problem.bias[0].data || problem.is_causal || problem.window; }

  void bound_keys() {
    const int32_t *begin = key_index, *end = key_index + n_keys;
    tile_begin = columns, tile_end = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      int64_t& first = first_key_[i] = 0;
      int64_t& last = last_key_[i] = i < block_queries ? n_keys : 0;
      if (i >= block_queries) continue;
      const int64_t position = query_index[first_query + i] + problem.keys - problem.queries;
      if (problem.window) first = std::lower_bound(begin, end, position - problem.window + 1) - begin;
      if (problem.is_causal) {
        last = std::upper_bound(begin, end, position) - begin;
      } else if (problem.window) {
        last = std::upper_bound(begin, end, position + problem.window - 1) - begin;
      }
      if (first >= last) {
        first = last = 0;
        continue;
      }
      tile_begin = std::min(tile_begin, first / kTile * kTile);
      tile_end = std::max(tile_end, std::min(round_up(last, kTile), columns));
    }
    tile_begin = std::min(tile_begin, tile_end);
  }

  // Which queries have a key to attend to in each view: the rows of the others are zero.
  void find_alive(int64_t b, int64_t head) {
    if (!masked()) return;
    for (int64_t i = 0; i < kBlock; ++i)
      for (int v = 0; v < 2; ++v) {
        const A* bias = i < block_queries && problem.bias[v].data ? bias_row(v, b, head, i) : nullptr;
        int64_t j = first_key_[i];
        for (; j < last_key_[i]; ++j) {
          if (masks_differ_ && !real_[v][j]) continue;
          if (!bias || bias[key_index[j] * problem.bias_key_stride[v]] != -std::numeric_limits<A>::infinity()) break;
        }
        alive_[i / kLanes][v * kLanes + i % kLanes] = j < last_key_[i] ? A(1) : A(0);
      }
  }

  const A* bias_row(int v, int64_t b, int64_t head, int64_t i) const {
    return reinterpret_cast<const A*>(problem.bias[v].head(b, head)) +
           query_index[first_query + i] * problem.bias[v].row_stride;
  }

  void load_bias(int v, int64_t b, int64_t head, int64_t t, int64_t n) {
    const int64_t keys = std::min(n, n_keys - t);
    for (int64_t i = 0; i < block_rows; ++i) {
      const A* from = i < block_queries ? bias_row(v, b, head, i) : nullptr;
      for (int64_t j = 0; j < keys; ++j)
        bias_[v][j * kScoresLd + i] =
            from ? from[key_index[t + j] * problem.bias_key_stride[v]] : -std::numeric_limits<A>::infinity();
    }
  }
};

}  // namespace ear_ops::cpu
