// Attention-matrix MSE straight from Q and K (DESIGN: "Numerics"). A task is one (pair, key head): its keys are packed
// once, query blocks of kBlock rows pass over them, and what exists of the two attention matrices is one block's rows.
// Keys that are padding in both views and queries that do not count are left out before anything is multiplied.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "isa.h"
#include "products.h"
#include "views.h"

namespace ear_ops::cpu {

namespace {

constexpr const char* kOp = "qk_attention_mse";
constexpr int64_t kBlock = 64;  // query rows whose scores are alive at a time
constexpr int64_t kTile = 256;  // keys of one product

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

struct Problem {
  int64_t pairs, heads, key_heads, queries, keys, dim;
  double scale;
  bool is_causal;
  int64_t window;
  Kind kind;
  std::array<Heads, 2> query, key;           // of each view
  std::array<Heads, 2> bias;                 // of the accumulator's type; data null without bias
  std::array<int64_t, 2> bias_key_stride{};  // of the bias' last dimension, 0 where it is broadcast
  OptionalTensor key_mask, counted_queries;
};

// Everything one thread works in.
template <typename P>
struct Workspace {
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  int32_t *key_index, *query_index;
  A *keys[2], *keys_t[2], *queries[2], *scores[2], *mask_bias[2], *row_bias[2];
  A *grad_queries, *grad_keys[2], *scores_t;
  Operand *keys_right[2], *keys_t_right[2], *queries_left[2], *queries_right[2], *scores_left, *scores_t_left;

  Workspace(Arena& arena, int64_t queries_max, int64_t keys_max, int64_t ld, bool backward) {
    const int64_t rows = round_up(std::min(queries_max, kBlock), P::kPadding),
                  columns = round_up(keys_max, P::kPadding);
    const int64_t tile = std::min(columns, kTile);
    const int64_t converted = P::kConverts;
    key_index = arena.take<int32_t>(keys_max);
    query_index = arena.take<int32_t>(queries_max);
    for (int v = 0; v < 2; ++v) {
      keys[v] = arena.take<A>(columns * ld);
      keys_t[v] = arena.take<A>(columns * ld);
      queries[v] = arena.take<A>(rows * ld);
      scores[v] = arena.take<A>(rows * columns);
      mask_bias[v] = arena.take<A>(columns);
      row_bias[v] = arena.take<A>(columns);
      grad_keys[v] = arena.take<A>(backward * columns * ld);
      keys_right[v] = arena.take<Operand>(converted * backward * columns * ld);
      keys_t_right[v] = arena.take<Operand>(converted * columns * ld);
      queries_left[v] = arena.take<Operand>(converted * rows * ld);
      queries_right[v] = arena.take<Operand>(converted * backward * rows * ld);
    }
    grad_queries = arena.take<A>(backward * rows * ld);
    scores_t = arena.take<A>(backward * tile * rows);
    scores_left = arena.take<Operand>(converted * backward * rows * tile);
    scores_t_left = arena.take<Operand>(converted * backward * tile * rows);
  }
};

// One task at a time: packs keys, forms blocks of scores, and leaves rows to the caller.
template <typename P>
struct Task {
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  const Problem& problem;
  const P& products;
  const Kernels<A>& table;
  Workspace<P> work;
  int64_t ld;

  int64_t n_keys = 0, n_queries = 0, columns = 0;
  bool masks_differ = false;
  // The current block.
  int64_t first_query = 0, block_queries = 0, block_rows = 0, tile_begin = 0, tile_end = 0;

  Task(const Problem& p, const P& prod, const Kernels<A>& t, Workspace<P> w)
      : problem(p), products(prod), table(t), work(w), ld(round_up(p.dim, P::kPadding)) {}

  // The keys real in either view and the queries that count, and each view's own mask over those keys.
  void select(int64_t b) {
    const uint8_t* real[2] = {mask_row(problem.key_mask, b), mask_row(problem.key_mask, problem.pairs + b)};
    const uint8_t* counted = mask_row(problem.counted_queries, b);
    n_keys = n_queries = 0;
    masks_differ = false;
    for (int64_t j = 0; j < problem.keys; ++j) {
      if (real[0] && !real[0][j] && !real[1][j]) continue;
      masks_differ |= real[0] && real[0][j] != real[1][j];
      work.key_index[n_keys++] = static_cast<int32_t>(j);
    }
    for (int64_t i = 0; i < problem.queries; ++i)
      if (!counted || counted[i]) work.query_index[n_queries++] = static_cast<int32_t>(i);
    columns = round_up(n_keys, P::kPadding);
    if (!masks_differ) return;
    for (int v = 0; v < 2; ++v)
      for (int64_t j = 0; j < columns; ++j)
        work.mask_bias[v][j] = j < n_keys && real[v][work.key_index[j]] ? A(0) : -kInfinity<A>;
  }

  void pack_keys(int64_t b, int64_t key_head, bool backward) {
    for (int v = 0; v < 2; ++v) {
      const uint8_t* real = mask_row(problem.key_mask, v * problem.pairs + b);
      table.gather_rows(problem.key[v].head(b, key_head), problem.kind, problem.key[v].row_stride, work.key_index, real,
                        n_keys, columns, problem.dim, ld, work.keys[v]);
      table.transpose(work.keys[v], ld, columns, ld, work.keys_t[v], columns);
      if constexpr (P::kConverts) {
        products.right(work.keys_t[v], columns, ld, columns, work.keys_t_right[v]);
        if (backward) products.right(work.keys[v], ld, columns, ld, work.keys_right[v]);
      }
    }
  }

  // Packed keys [first, last) that structure lets packed query i attend to.
  std::pair<int64_t, int64_t> allowed(int64_t i) const {
    const int32_t* begin = work.key_index;
    const int32_t* end = begin + n_keys;
    const int64_t position = work.query_index[i] + problem.keys - problem.queries;
    int64_t first = 0, last = n_keys;
    if (problem.window) first = std::lower_bound(begin, end, position - problem.window + 1) - begin;
    if (problem.is_causal) {
      last = std::upper_bound(begin, end, position) - begin;
    } else if (problem.window) {
      last = std::upper_bound(begin, end, position + problem.window - 1) - begin;
    }
    return {std::min(first, last), last};
  }

  // Scores of queries [begin, begin + kBlock) against every key tile that any of them may attend to.
  void score_block(int64_t b, int64_t head, int64_t begin, bool backward) {
    first_query = begin;
    block_queries = std::min(kBlock, n_queries - begin);
    block_rows = round_up(block_queries, P::kPadding);
    tile_begin = columns, tile_end = 0;
    for (int64_t i = begin; i < begin + block_queries; ++i) {
      const auto [first, last] = allowed(i);
      if (first == last) continue;
      tile_begin = std::min(tile_begin, first / kTile * kTile);
      tile_end = std::max(tile_end, std::min(round_up(last, kTile), columns));
    }
    tile_begin = std::min(tile_begin, tile_end);
    for (int v = 0; v < 2; ++v) {
      table.gather_rows(problem.query[v].head(b, head), problem.kind, problem.query[v].row_stride,
                        work.query_index + begin, nullptr, block_queries, block_rows, problem.dim, ld, work.queries[v]);
      const Operand* left;
      const Operand* right;
      if constexpr (P::kConverts) {
        products.left(work.queries[v], ld, block_rows, ld, work.queries_left[v], ld);
        if (backward) products.right(work.queries[v], ld, block_rows, ld, work.queries_right[v]);
        left = work.queries_left[v], right = work.keys_t_right[v];
      } else {
        left = work.queries[v], right = work.keys_t[v];
      }
      constexpr int64_t kRowsTogether = P::kConverts ? 2 : 1;  // how the right operand interleaves rows
      for_tiles([&](int64_t t, int64_t n) {
        products.multiply(block_rows, n, ld, left, ld, right + t * kRowsTogether, columns, work.scores[v] + t, columns,
                          false);
      });
    }
  }

  template <typename Body>
  void for_tiles(const Body& body) const {
    for (int64_t t = tile_begin; t < tile_end; t += kTile) body(t, std::min(kTile, tile_end - t));
  }

  // Row i of the current block, with the bias of both views gathered for its keys.
  Row<A> row(int64_t b, int64_t head, int64_t i) {
    const auto [first, last] = allowed(first_query + i);
    Row<A> r{};
    r.scores = work.scores[0] + i * columns;
    r.scores_aug = work.scores[1] + i * columns;
    r.first = first, r.last = last;
    r.begin = tile_begin, r.end = tile_end;
    if (r.first == r.last) r.first = r.last = tile_begin;
    r.scale = static_cast<A>(problem.scale);
    const A* bias[2] = {};
    for (int v = 0; v < 2; ++v) {
      if (masks_differ) bias[v] = work.mask_bias[v];
      if (!problem.bias[v].data) continue;
      const A* from = reinterpret_cast<const A*>(problem.bias[v].head(b, head)) +
                      work.query_index[first_query + i] * problem.bias[v].row_stride;
      for (int64_t j = tile_begin; j < tile_end; ++j) {
        const bool real = j < n_keys && !(masks_differ && work.mask_bias[v][j] != 0);
        work.row_bias[v][j] = real ? from[work.key_index[j] * problem.bias_key_stride[v]] : -kInfinity<A>;
      }
      bias[v] = work.row_bias[v];
    }
    r.bias = bias[0], r.bias_aug = bias[1];
    return r;
  }
};

Problem make_problem(const Tensor& query, const Tensor& key, const OptionalTensor& query_aug,
                     const OptionalTensor& key_aug, const OptionalTensor& key_mask,
                     const OptionalTensor& counted_queries, const OptionalTensor& attn_bias,
                     const OptionalTensor& attn_bias_aug, double scale, bool is_causal, int64_t window,
                     std::vector<Tensor>& keep_alive) {
  check_dim(kOp, "query", query, 4, "[B, H, L, D]");
  check_dim(kOp, "key", key, 4, "[B, H_kv, S, D]");
  Problem p{};
  p.pairs = pairs_of(kOp, "query", query, !query_aug.has_value());
  p.heads = query.size(1), p.queries = query.size(2), p.dim = query.size(3);
  p.key_heads = key.size(1), p.keys = key.size(2);
  TORCH_CHECK_VALUE(p.key_heads > 0 && p.heads % p.key_heads == 0, kOp,
                    ": key: expected a number of heads that divides ", p.heads, ", got shape ", key.sizes());
  check_shape(kOp, "key", key, {query.size(0), p.key_heads, p.keys, p.dim});
  check_dtype(kOp, "key", key, query.scalar_type());
  TORCH_CHECK_VALUE(query_aug.has_value() == key_aug.has_value(), kOp,
                    ": query_aug, key_aug: expected both or neither");
  check_optional(kOp, "query_aug", query_aug, query.sizes(), query.scalar_type());
  check_optional(kOp, "key_aug", key_aug, key.sizes(), query.scalar_type());
  check_optional(kOp, "key_mask", key_mask, {2 * p.pairs, p.keys}, at::kBool);
  check_optional(kOp, "counted_queries", counted_queries, {p.pairs, p.queries}, at::kBool);
  const std::array<int64_t, 4> whole = {p.pairs, p.heads, p.queries, p.keys};
  check_optional(kOp, "attn_bias", attn_bias, whole, accumulator_of(query));
  check_optional(kOp, "attn_bias_aug", attn_bias_aug, whole, accumulator_of(query));
  TORCH_CHECK_VALUE(p.keys < (int64_t(1) << 31) && p.queries < (int64_t(1) << 31), kOp, ": sequences are too long");
  p.scale = scale, p.is_causal = is_causal, p.window = window;
  p.kind = kind_of(kOp, query);
  p.key_mask = dense(key_mask);
  p.counted_queries = dense(counted_queries);
  const auto queries = split_views(query, query_aug, p.pairs), keys = split_views(key, key_aug, p.pairs);
  for (int v = 0; v < 2; ++v) {
    keep_alive.insert(keep_alive.end(), {queries[v], keys[v]});
    p.query[v] = Heads(queries[v]);
    p.key[v] = Heads(keys[v]);
    if (!attn_bias) continue;
    const Tensor& bias = v == 1 && attn_bias_aug ? *attn_bias_aug : *attn_bias;
    p.bias[v] = Heads(bias);
    p.bias_key_stride[v] = bias.stride(3);
  }
  return p;
}

template <typename P, typename Body>
void for_tasks(const Problem& p, bool backward, const Body& body) {
  const P products(selection());
  const auto& table = kernels<typename P::Accumulator>(*selection().isa);
  const int64_t ld = round_up(p.dim, P::kPadding);
  const Workspaces<Workspace<P>, int64_t, int64_t, int64_t, bool> workspaces(p.queries, p.keys, ld, backward);
  at::parallel_for(0, p.pairs * p.key_heads, 1, [&](int64_t begin, int64_t end) {
    Task<P> task(p, products, table, workspaces.of_this_thread());
    int64_t selected = -1;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / p.key_heads, key_head = index % p.key_heads;
      if (b != selected) task.select(b);
      selected = b;
      if (task.n_keys == 0 || task.n_queries == 0) continue;
      task.pack_keys(b, key_head, backward);
      body(task, b, key_head);
    }
    products.release();
  });
}

template <typename P>
void forward(const Problem& p, Tensor& sums, Tensor& row_stats) {
  using A = typename P::Accumulator;
  A* sum = sums.data_ptr<A>();
  A* stats = row_stats.data_ptr<A>();
  const int64_t rows = p.pairs * p.heads * p.queries, group = p.heads / p.key_heads;
  for_tasks<P>(p, false, [&](Task<P>& task, int64_t b, int64_t key_head) {
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      double total = 0;
      for (int64_t begin = 0; begin < task.n_queries; begin += kBlock) {
        task.score_block(b, head, begin, false);
        for (int64_t i = 0; i < task.block_queries; ++i) {
          RowStats<A> s;
          total += task.table.forward_row(task.row(b, head, i), &s);
          A* at = stats + (b * p.heads + head) * p.queries + task.work.query_index[begin + i];
          const A values[kRowStats] = {s.max, s.max_aug, s.inverse, s.inverse_aug, s.d, s.d_aug};
          for (int64_t k = 0; k < kRowStats; ++k) at[k * rows] = values[k];
        }
      }
      sum[b * p.heads + head] = static_cast<A>(total);
    }
  });
}

struct Gradients {  // data null where it is not asked for
  std::array<Heads, 2> query, key;
};

template <typename P>
void backward(const Problem& p, const Tensor& grad_sums, const Tensor& row_stats, const Gradients& out) {
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;
  const A* upstream = grad_sums.data_ptr<A>();
  const A* stats = row_stats.data_ptr<A>();
  const int64_t rows = p.pairs * p.heads * p.queries, group = p.heads / p.key_heads;
  for_tasks<P>(p, true, [&](Task<P>& task, int64_t b, int64_t key_head) {
    auto& w = task.work;
    const auto& products = task.products;
    const int64_t ld = task.ld, columns = task.columns;
    for (int v = 0; v < 2; ++v)
      if (out.key[v].data) std::fill(w.grad_keys[v], w.grad_keys[v] + columns * ld, A(0));
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      const A gradient = static_cast<A>(2 * p.scale) * upstream[b * p.heads + head];
      for (int64_t begin = 0; begin < task.n_queries; begin += kBlock) {
        task.score_block(b, head, begin, true);
        for (int64_t i = 0; i < task.block_queries; ++i) {
          const A* at = stats + (b * p.heads + head) * p.queries + w.query_index[begin + i];
          const RowStats<A> saved = {at[0], at[rows], at[2 * rows], at[3 * rows], at[4 * rows], at[5 * rows]};
          task.table.backward_row(task.row(b, head, i), saved, gradient);
        }
        for (int v = 0; v < 2; ++v) {
          if (task.block_rows > task.block_queries)
            std::fill(w.scores[v] + task.block_queries * columns, w.scores[v] + task.block_rows * columns, A(0));
          bool first_tile = true;
          task.for_tiles([&](int64_t t, int64_t n) {
            const A* scores = w.scores[v] + t;
            if (out.query[v].data) {
              const Operand* left;
              const Operand* right;
              int64_t ld_left = columns;
              if constexpr (P::kConverts) {
                products.left(scores, columns, task.block_rows, n, w.scores_left, n);
                left = w.scores_left, ld_left = n, right = w.keys_right[v] + t * ld;
              } else {
                left = scores, right = w.keys[v] + t * ld;
              }
              products.multiply(task.block_rows, ld, n, left, ld_left, right, ld, w.grad_queries, ld, !first_tile);
            }
            if (out.key[v].data) {
              task.table.transpose(scores, columns, task.block_rows, n, w.scores_t, task.block_rows);
              const Operand* left;
              const Operand* right;
              if constexpr (P::kConverts) {
                products.left(w.scores_t, task.block_rows, n, task.block_rows, w.scores_t_left, task.block_rows);
                left = w.scores_t_left, right = w.queries_right[v];
              } else {
                left = w.scores_t, right = w.queries[v];
              }
              products.multiply(n, ld, task.block_rows, left, task.block_rows, right, ld, w.grad_keys[v] + t * ld, ld,
                                true);
            }
            first_tile = false;
          });
          if (out.query[v].data) {
            if (first_tile) std::fill(w.grad_queries, w.grad_queries + task.block_rows * ld, A(0));
            task.table.scatter_rows(w.grad_queries, ld, task.block_queries, p.dim, p.kind, out.query[v].row_stride,
                                    w.query_index + begin, out.query[v].head(b, head));
          }
        }
      }
    }
    for (int v = 0; v < 2; ++v)
      if (out.key[v].data)
        task.table.scatter_rows(w.grad_keys[v], ld, task.n_keys, p.dim, p.kind, out.key[v].row_stride, w.key_index,
                                out.key[v].head(b, key_head));
  });
}

// Calls body with the Products type that fits the input.
template <typename Body>
void with_products(const Tensor& query, const Body& body) {
  if (query.scalar_type() == at::kDouble) {
    body(static_cast<PlainProducts<double>*>(nullptr));
  } else if (query.scalar_type() == at::kBFloat16 && selection().bf16 != Bf16Products::kNone) {
    body(static_cast<Bf16MatrixProducts*>(nullptr));
  } else {
    body(static_cast<PlainProducts<float>*>(nullptr));
  }
}

}  // namespace

}  // namespace ear_ops::cpu

namespace ear_ops {

std::tuple<Tensor, Tensor> qk_attention_mse(const Tensor& query, const Tensor& key, const OptionalTensor& query_aug,
                                            const OptionalTensor& key_aug, const OptionalTensor& key_mask,
                                            const OptionalTensor& counted_queries, const OptionalTensor& attn_bias,
                                            const OptionalTensor& attn_bias_aug, double scale, bool is_causal,
                                            int64_t window) {
  std::vector<Tensor> keep_alive;
  const auto p = cpu::make_problem(query, key, query_aug, key_aug, key_mask, counted_queries, attn_bias, attn_bias_aug,
                                   scale, is_causal, window, keep_alive);
  const auto options = query.options().dtype(cpu::accumulator_of(query));
  Tensor sums = at::zeros({p.pairs, p.heads}, options);
  Tensor row_stats = at::zeros({cpu::kRowStats, p.pairs, p.heads, p.queries}, options);
  cpu::with_products(
      query, [&](auto* products) { cpu::forward<std::remove_pointer_t<decltype(products)>>(p, sums, row_stats); });
  return {sums, row_stats};
}

std::vector<Tensor> qk_attention_mse_backward(const Tensor& grad_sums, const Tensor& query, const Tensor& key,
                                              const OptionalTensor& query_aug, const OptionalTensor& key_aug,
                                              const OptionalTensor& key_mask, const OptionalTensor& counted_queries,
                                              const OptionalTensor& attn_bias, const OptionalTensor& attn_bias_aug,
                                              double scale, bool is_causal, int64_t window, const Tensor& row_stats,
                                              const c10::List<bool>& needs) {
  std::vector<Tensor> keep_alive, gradients;
  const auto p = cpu::make_problem(query, key, query_aug, key_aug, key_mask, counted_queries, attn_bias, attn_bias_aug,
                                   scale, is_causal, window, keep_alive);
  check_shape(cpu::kOp, "grad_sums", grad_sums, {p.pairs, p.heads});
  check_shape(cpu::kOp, "row_stats", row_stats, {cpu::kRowStats, p.pairs, p.heads, p.queries});
  TORCH_CHECK_VALUE(needs.size() == 4, cpu::kOp, ": needs: expected 4 entries, got ", needs.size());
  // Rows that are left out keep the zeros; with nothing left out every element is written.
  const bool all_written = !key_mask && !counted_queries && p.keys > 0 && p.queries > 0;
  auto make = [&](const Tensor& like) {
    gradients.push_back(all_written ? at::empty(like.sizes(), like.options())
                                    : at::zeros(like.sizes(), like.options()));
    return gradients.back();
  };
  cpu::Gradients out;
  for (int input = 0; input < 2; ++input) {  // query, key
    auto& views = input == 0 ? out.query : out.key;
    const Tensor& first = input == 0 ? query : key;
    if (needs.get(input)) {
      const auto halves = cpu::split_views(make(first), query_aug ? OptionalTensor(first) : std::nullopt, p.pairs);
      views[0] = cpu::Heads(halves[0]);
      if (!query_aug) views[1] = cpu::Heads(halves[1]);
    }
  }
  for (int input = 0; input < 2; ++input) {  // query_aug, key_aug
    if (needs.get(2 + input) && query_aug)
      (input == 0 ? out.query : out.key)[1] = cpu::Heads(make(input == 0 ? *query_aug : *key_aug));
  }
  const Tensor upstream = grad_sums.to(cpu::accumulator_of(query)).contiguous(), stats = row_stats.contiguous();
  cpu::with_products(query, [&](auto* products) {
    cpu::backward<std::remove_pointer_t<decltype(products)>>(p, upstream, stats, out);
  });
  return gradients;
}

}  // namespace ear_ops
