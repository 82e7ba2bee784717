// Attention-matrix MSE straight from Q and K: blocks of queries pass over tiles of keys, and what
// exists of the two attention matrices is one tile. Keys that are padding in both views and queries that do not count
// are left out before anything is multiplied.
#include <ATen/ops/zeros.h>

#include <numeric>

#include "qk_task.h"
#include "schedule.h"

namespace ear_ops::cpu {

namespace {

constexpr const char* kOp = "qk_attention_mse";

int64_t count_real(const uint8_t* mask, const uint8_t* other, int64_t n) {
  if (!mask) return n;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += mask[i] || (other && other[i]);
  return count;
}

// One piece of the work on one key head: some blocks of its queries against some of its keys.
struct Piece {
  int64_t b, key_head;
  int64_t index, of;  // piece `index` of `of`
};

// The pieces of all key heads, the largest pairs first, so that the last ones to finish are small.
class Plan {
 public:
  Plan(const QKProblem& p, int64_t pieces) : p_(p), pieces_(pieces), order_(p.pairs) {
    std::iota(order_.begin(), order_.end(), 0);
    if (!p.key_mask && !p.counted_queries) return;
    std::vector<int64_t> cost(p.pairs);
    for (int64_t b = 0; b < p.pairs; ++b)
      cost[b] = count_real(mask_row(p.key_mask, b), mask_row(p.key_mask, p.pairs + b), p.keys) *
                count_real(mask_row(p.counted_queries, b), nullptr, p.queries);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t x, int64_t y) { return cost[x] > cost[y]; });
  }
  int64_t size() const { return p_.pairs * p_.key_heads * pieces_; }
  Piece operator[](int64_t i) const {
    return {order_[i / pieces_ / p_.key_heads], i / pieces_ % p_.key_heads, i % pieces_, pieces_};
  }

 private:
  const QKProblem& p_;
  int64_t pieces_;
  std::vector<int64_t> order_;
};

int64_t workers(const QKProblem& p) {
  constexpr double kPerVector = 16;  // multiplications
  return workers_for(1.0 * p.pairs * p.heads * p.queries * p.keys * p.dim / kPerVector);
}

int64_t blocks(int64_t queries) { return (queries + kBlock - 1) / kBlock; }

template <typename P, typename Body>
void run(const QKProblem& p, const Plan& plan, bool backward, const Body& body) {
  const auto& table = kernels<typename P::Accumulator>(*selection().isa);
  const P products(selection());
  const int64_t count = std::min(workers(p), plan.size());
  Arena measure(nullptr);
  QKTask<P>(p, products, table, measure, backward);
  const Scratch scratch(count, measure.used());
  run_tasks(plan.size(), count, [&](int64_t worker, const auto& next) {
    Arena arena = scratch.of(worker);
    QKTask<P> task(p, products, table, arena, backward);
    int64_t selected = -1;
    for (int64_t i = next(); i < plan.size(); i = next()) {
      const Piece piece = plan[i];
      if (piece.b != selected) task.select(piece.b);
      selected = piece.b;
      if (task.n_keys > 0 && task.n_queries > 0) body(task, piece);
    }
    products.release();
  });
}

// Calls body(head, block) for the piece's share of all blocks of its key head.
template <typename P, typename Body>
void for_blocks(const QKTask<P>& task, const Piece& piece, const Body& body) {
  const int64_t per_head = blocks(task.n_queries), all = task.problem.group() * per_head;
  for (int64_t i = piece.index * all / piece.of; i < (piece.index + 1) * all / piece.of; ++i)
    body(piece.key_head * task.problem.group() + i / per_head, i % per_head);
}

// sum (P - T)^2 of the loaded block; leaves the statistics in task.stats.
template <typename P>
double forward_block(QKTask<P>& task, int64_t b, int64_t head) {
  using A = typename P::Accumulator;
  const int64_t n_columns = task.block_rows / kLanes, all = task.tile_end - task.tile_begin;
  const bool one_sweep = all > 0 && all <= kOneSweep;
  for (int64_t c = 0; c < n_columns; ++c) {
    auto& s = task.stats[c];
    for (int v = 0; v < 2; ++v) {
      std::fill_n(s.max[v], kLanes, -std::numeric_limits<A>::infinity());
      std::fill_n(s.inverse[v], kLanes, A(0));
      std::fill_n(s.d[v], kLanes, A(0));
    }
  }
  double total = 0;
  auto sweep = [&](const auto& body) {  // body(column, its statistics) for every tile
    auto tile = [&](int64_t t, int64_t n) {
      task.score(b, head, t, n);
      for (int64_t c = 0; c < n_columns; ++c) body(task.column(c, t, n), &task.stats[c]);
    };
    if (one_sweep) return tile(task.tile_begin, all);
    task.for_tiles(0, task.tile_end, tile);
  };
  auto finish = [&](int64_t c) { task.table.finish_softmax(task.alive(c), &task.stats[c]); };
  if (one_sweep) {
    int64_t c = 0;
    sweep([&](const Column<A>& column, ColumnStats<A>* stats) {
      task.table.softmax_tile(column, stats);
      finish(c++);
      total += task.table.difference_tile(column, true, stats);
    });
  } else {
    sweep([&](const Column<A>& column, ColumnStats<A>* stats) { task.table.softmax_tile(column, stats); });
    for (int64_t c = 0; c < n_columns; ++c) finish(c);
    sweep([&](const Column<A>& column, ColumnStats<A>* stats) {
      total += task.table.difference_tile(column, false, stats);
    });
  }
  return total;
}

template <typename P>
void forward(const QKProblem& p, Tensor& sums, Tensor& row_stats) {
  using A = typename P::Accumulator;
  A* saved = row_stats.data_ptr<A>();
  const int64_t rows = p.pairs * p.heads * p.queries, per_head = blocks(p.queries);
  const Tensor block_sums = at::zeros({p.pairs * p.heads, per_head}, sums.options().dtype(at::kDouble));
  double* block_sum = block_sums.data_ptr<double>();
  const Plan plan(p, pieces_per_task(p.pairs * p.key_heads, workers(p), p.group() * per_head));
  run<P>(p, plan, false, [&](QKTask<P>& task, const Piece& piece) {
    task.pack_keys(piece.b, piece.key_head, false);
    for_blocks(task, piece, [&](int64_t head, int64_t block) {
      task.load_queries(piece.b, head, block * kBlock, false);
      block_sum[(piece.b * p.heads + head) * per_head + block] = forward_block(task, piece.b, head);
      for (int64_t i = 0; i < task.block_queries; ++i) {
        const auto& s = task.stats[i / kLanes];
        const int64_t lane = i % kLanes;
        A* to = saved + (piece.b * p.heads + head) * p.queries + task.query_index[task.first_query + i];
        const A values[kRowStats] = {s.max[0][lane],     s.max[1][lane], s.inverse[0][lane],
                                     s.inverse[1][lane], s.d[0][lane],   s.d[1][lane]};
        for (int64_t k = 0; k < kRowStats; ++k) to[k * rows] = values[k];
      }
    });
  });
  A* sum = sums.data_ptr<A>();
  for (int64_t i = 0; i < p.pairs * p.heads; ++i)
    sum[i] = static_cast<A>(std::accumulate(block_sum + i * per_head, block_sum + (i + 1) * per_head, 0.0));
}

template <typename P>
void load_stats(QKTask<P>& task, const typename P::Accumulator* saved, int64_t b, int64_t head) {
  const auto& p = task.problem;
  const int64_t rows = p.pairs * p.heads * p.queries;
  for (int64_t i = 0; i < task.block_rows; ++i) {
    auto& s = task.stats[i / kLanes];
    const int64_t lane = i % kLanes;
    const bool padding = i >= task.block_queries;  // no keys, and so no gradient
    const auto* from =
        saved + (b * p.heads + head) * p.queries + (padding ? 0 : task.query_index[task.first_query + i]);
    for (int v = 0; v < 2; ++v) {
      s.max[v][lane] = padding ? 0 : from[v * rows];
      s.inverse[v][lane] = padding ? 0 : from[(2 + v) * rows];
      s.d[v][lane] = padding ? 0 : from[(4 + v) * rows];
    }
  }
}

struct Gradients {  // data null where it is not asked for
  std::array<Heads, 2> query, key;
};

bool any(const std::array<Heads, 2>& views) { return views[0].data || views[1].data; }

// Gradients of the queries (of the piece's blocks) and keys (all those, or within [key_begin, key_end)) that `out`
// names.
template <typename P>
void backward_piece(QKTask<P>& task, const Piece& blocks_of, const typename P::Accumulator* upstream,
                    const typename P::Accumulator* saved, int64_t key_begin, int64_t key_end, const Gradients& out) {
  using A = typename P::Accumulator;
  const auto& p = task.problem;
  const int64_t b = blocks_of.b, ld = task.ld;
  key_end = std::min(key_end, task.columns);
  if (key_begin >= key_end) return;
  task.pack_keys(b, blocks_of.key_head, any(out.query));
  for (int v = 0; v < 2; ++v)
    if (out.key[v].data) std::fill(task.grad_keys[v] + key_begin * ld, task.grad_keys[v] + key_end * ld, A(0));
  for_blocks(task, blocks_of, [&](int64_t head, int64_t block) {
    const A gradient = static_cast<A>(2 * p.scale) * upstream[b * p.heads + head];
    task.load_queries(b, head, block * kBlock, true);
    load_stats(task, saved, b, head);
    bool first_tile = true;
    task.for_tiles(key_begin, key_end, [&](int64_t t, int64_t n) {
      task.score(b, head, t, n);
      for (int64_t c = 0; c < task.block_rows / kLanes; ++c)
        task.table.gradient_tile(task.column(c, t, n), task.stats[c], gradient);
      for (int v = 0; v < 2; ++v) {
        if (out.query[v].data) task.add_grad_queries(v, t, n, !first_tile);
        if (out.key[v].data) task.add_grad_keys(v, t, n);
      }
      first_tile = false;
    });
    for (int v = 0; v < 2; ++v) {
      if (!out.query[v].data) continue;
      if (first_tile) std::fill_n(task.grad_queries_t[v], ld * task.block_rows, A(0));
      task.table.transpose(task.grad_queries_t[v], task.block_rows, ld, task.block_rows, task.grad_queries, ld);
      task.table.scatter_rows(task.grad_queries, ld, task.block_queries, p.dim, p.kind, out.query[v].row_stride,
                              task.query_index + task.first_query, out.query[v].head(b, head));
    }
  });
  for (int v = 0; v < 2; ++v)
    if (out.key[v].data)
      task.table.scatter_rows(task.grad_keys[v] + key_begin * ld, ld, std::min(key_end, task.n_keys) - key_begin, p.dim,
                              p.kind, out.key[v].row_stride, task.key_index + key_begin,
                              out.key[v].head(b, blocks_of.key_head));
}

template <typename P>
void backward(const QKProblem& p, const Tensor& grad_sums, const Tensor& row_stats, const Gradients& out) {
  using A = typename P::Accumulator;
  const A* upstream = grad_sums.data_ptr<A>();
  const A* saved = row_stats.data_ptr<A>();
  const int64_t tasks = p.pairs * p.key_heads, count = workers(p);
  // A thread that owns a key head makes both gradients from the same scores. With too few key heads for the threads,
  // blocks and then keys are shared out instead, at the price of scores made twice; every sum runs in the same order.
  constexpr double kPriceOfTwice = 1.4;
  const double rounds = static_cast<double>((tasks + count - 1) / count);
  if (rounds <= kPriceOfTwice * tasks / count) {
    return run<P>(p, Plan(p, 1), true, [&](QKTask<P>& task, const Piece& piece) {
      backward_piece(task, piece, upstream, saved, 0, p.keys + P::kPadding, out);
    });
  }
  if (any(out.query)) {
    const Gradients queries = {out.query, {}};
    const int64_t pieces = pieces_per_task(tasks, count, p.group() * blocks(p.queries));
    run<P>(p, Plan(p, pieces), true, [&](QKTask<P>& task, const Piece& piece) {
      backward_piece(task, piece, upstream, saved, 0, p.keys + P::kPadding, queries);
    });
  }
  if (any(out.key)) {
    const Gradients keys = {{}, out.key};
    const int64_t tiles = (p.keys + kTile - 1) / kTile, pieces = pieces_per_task(tasks, count, tiles);
    run<P>(p, Plan(p, pieces), true, [&](QKTask<P>& task, const Piece& piece) {
      const Piece all_blocks = {piece.b, piece.key_head, 0, 1};
      backward_piece(task, all_blocks, upstream, saved, piece.index * tiles / pieces * kTile,
                     (piece.index + 1) * tiles / pieces * kTile, keys);
    });
  }
}

}  // namespace

}  // namespace ear_ops::cpu

namespace ear_ops {

std::tuple<Tensor, Tensor> qk_attention_mse(const Tensor& query, const Tensor& key, const OptionalTensor& query_aug,
                                            const OptionalTensor& key_aug, const OptionalTensor& key_mask,
                                            const OptionalTensor& counted_queries, const OptionalTensor& attn_bias,
                                            const OptionalTensor& attn_bias_aug, double scale, bool is_causal,
                                            int64_t window, std::optional<double> softcap) {
  TORCH_CHECK_VALUE(!softcap, "qk_attention_mse: softcap: computed by the reference only, use backend='reference'");
  const auto p = cpu::make_qk_problem(query, key, query_aug, key_aug, key_mask, counted_queries, attn_bias,
                                      attn_bias_aug, scale, is_causal, window);
  const auto options = query.options().dtype(cpu::accumulator_of(query));
  Tensor sums = at::zeros({p.pairs, p.heads}, options);
  Tensor row_stats = at::zeros({cpu::kRowStats, p.pairs, p.heads, p.queries}, options);
  cpu::with_products(query.scalar_type(), [&](auto* products) {
    cpu::forward<std::remove_pointer_t<decltype(products)>>(p, sums, row_stats);
  });
  return {sums, row_stats};
}

std::vector<Tensor> qk_attention_mse_backward(const Tensor& grad_sums, const Tensor& query, const Tensor& key,
                                              const OptionalTensor& query_aug, const OptionalTensor& key_aug,
                                              const OptionalTensor& key_mask, const OptionalTensor& counted_queries,
                                              const OptionalTensor& attn_bias, const OptionalTensor& attn_bias_aug,
                                              double scale, bool is_causal, int64_t window,
                                              std::optional<double> softcap, const Tensor& row_stats,
                                              const c10::List<bool>& needs) {
  TORCH_CHECK_VALUE(!softcap, "qk_attention_mse: softcap: computed by the reference only, use backend='reference'");
  std::vector<Tensor> gradients;
  const auto p = cpu::make_qk_problem(query, key, query_aug, key_aug, key_mask, counted_queries, attn_bias,
                                      attn_bias_aug, scale, is_causal, window);
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
  cpu::with_products(query.scalar_type(), [&](auto* products) {
    cpu::backward<std::remove_pointer_t<decltype(products)>>(p, upstream, stats, out);
  });
  return gradients;
}

}  // namespace ear_ops
