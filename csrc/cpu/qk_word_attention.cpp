// Compares attention between words, straight from Q and K. A word's row of the map M is the mean over its pieces of
// rows of P, summed over the pieces of every word. What exists of the two maps is one strip of words a thread.
//
//   memory     K of a key head                Q of a block of 64 queries, in the order of their words, of each view
//                | gather, or where it lies     | gather, transpose
//   scratch    scores of a tile, [256 keys, 64 queries]
//                | 16 queries at a time in vectors of registers
//   scratch    sums of exponentials [words, 64], under the largest score so far
//                | transpose; divided by the row's sum and the pieces of the query's word
//   scratch    M of the strip, [at most 64 words, words], of each view
//                | compared                              | backward: dM
//   memory     sums [B, H]; row_stats [4, B, H, L]
//   scratch                                              dM [words, 64] over the queries; d = sum P dP
//                                                          | with the exponentials, which are made again
//   scratch                                              dS in place of the scores --> dQ^T of the block, dK of the
//   head
//
// A strip is as many words as have at most 64 queries in each view. A word with more has a strip of its own, of several
// blocks. One thread makes all of a key head, so that sums run in one order on any number of threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "../register.h"
#include "qk/backward.h"
#include "qk/plan.h"
#include "qk/words.h"

namespace ear_ops::cpu {

namespace {

template <typename P>
struct WordForward : WordTask<P> {
  WordForward(const WordInputs& inputs, const P& products, Arena& arena)
      : WordTask<P>(inputs, products, arena, false) {}
};

// The rows of M of the words [begin, end) in both views, and the statistics of their queries.
template <typename P>
void make_maps(WordForward<P>& task, int64_t b, int64_t head, int64_t begin, int64_t end,
               typename P::Accumulator* saved) {
  using A = typename P::Accumulator;
  const auto& p = task.inputs;
  const int64_t all_rows = p.pairs * p.heads * p.queries;
  for (int v = 0; v < 2; ++v) {
    std::fill_n(task.maps[v], (end - begin) * task.words.rows, A(0));
    task.for_blocks(v, b, head, begin, end, [&] {
      auto& block = task.blocks[v];
      task.clear_sums(v);
      for (int64_t c = 0; c < kBlock / kLanes; ++c) {
        auto& rows = task.stats[c];
        std::fill_n(rows.max, kLanes, -std::numeric_limits<A>::infinity());
        std::fill_n(rows.sum, kLanes, A(0));
        std::fill_n(rows.alive, kLanes, A(0));
      }
      task.for_tiles(v, [&](int64_t t, int64_t n) {
        task.score(v, b, head, t, n);
        task.for_lane_groups(v, [&](int64_t c) {
          task.table.add_words(task.lane_group(v, c, t, n), task.words.key_word[v] + t, task.words.rows, &task.stats[c],
                               block.sums + c * kLanes);
        });
      });
      for (int64_t i = 0; i < block.n; ++i) {
        const auto& rows = task.stats[i / kLanes];
        const int64_t lane = i % kLanes;
        block.max[i] = rows.max[lane];
        block.inverse[i] = rows.alive[lane] == 0 ? A(0) : 1 / rows.sum[lane];  // no key at all: a row of zeros
        A* to = saved + (b * p.heads + head) * p.queries + task.query(v, i);
        to[v * all_rows] = block.max[i];
        to[(2 + v) * all_rows] = block.inverse[i];
      }
      task.add_to_maps(v, begin);
    });
  }
}

// Calls body(head, begin, end) for the strips of all heads of a key head.
template <typename P, typename Body>
void for_strips(const WordTask<P>& task, const Share& share, const Body& body) {
  const int64_t group = task.inputs.group();
  for (int64_t head = share.key_head * group; head < (share.key_head + 1) * group; ++head)
    for (int64_t begin = 0, end; begin < task.words.n_shared; begin = end) {
      end = task.words.strip_end(begin);
      body(head, begin, end);
    }
}

template <typename P>
void make_sums(const WordInputs& p, Tensor& sums, Tensor& row_stats) {
  using A = typename P::Accumulator;
  const P products(selection());
  A *saved = row_stats.data_ptr<A>(), *sum = sums.data_ptr<A>();
  run<WordForward<P>>(p, products, Plan(p, 1), [&](WordForward<P>& task, const Share& share) {
    task.pack_keys(share.b, share.key_head, false);
    std::vector<double> totals(p.group());
    for_strips(task, share, [&](int64_t head, int64_t begin, int64_t end) {
      make_maps(task, share.b, head, begin, end, saved);
      totals[head % p.group()] += task.loops.value(task.maps[0], task.maps[1], end - begin, task.words.rows);
    });
    std::copy(totals.begin(), totals.end(), sum + share.b * p.heads + share.key_head * p.group());
  });
}

template <typename P>
struct WordBackward : WordTask<P> {
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  A *grad_queries_t, *grad_queries, *grad_keys[2];
  A* of_maps[2];  // [kBlock, rows], gradients of maps
  A* of_sums;     // [rows, kScoresLd], gradients of sums over the keys of a word
  A* d;           // [kBlock]

  WordBackward(const WordInputs& inputs, const P& products, Arena& arena) : WordTask<P>(inputs, products, arena, true) {
    const int64_t rows = round_up(std::min(inputs.queries, kBlock), P::kPadding);
    const int64_t all = round_up(inputs.keys, P::kPadding), ld = this->ld, of_words = inputs.max_rows();
    grad_queries_t = arena.take<A>(rows * ld);
    grad_queries = arena.take<A>(rows * ld);
    of_sums = arena.take<A>(of_words * kScoresLd);
    d = arena.take<A>(kBlock);
    for (int v = 0; v < 2; ++v) {
      grad_keys[v] = arena.take<A>(all * ld);
      of_maps[v] = arena.take<A>(kBlock * of_words);
    }
    if constexpr (P::kInPairs) {
      const int64_t tile = std::min(all, kTile);
      left_ = arena.take<Operand>(tile * rows);
      right_ = arena.take<Operand>(tile * rows);
    }
  }

  // Exponentials of the loaded block, and their sums over the keys of each word.
  void sum_words(int v, int64_t b, int64_t head, const A* saved) {
    const auto& p = this->inputs;
    auto& block = this->blocks[v];
    const int64_t all_rows = p.pairs * p.heads * p.queries;
    for (int64_t i = 0; i < block.padded; ++i) {
      const A* from = saved + (b * p.heads + head) * p.queries + (i < block.n ? this->query(v, i) : 0);
      block.max[i] = i < block.n ? from[v * all_rows] : 0;
      block.inverse[i] = i < block.n ? from[(2 + v) * all_rows] : 0;
    }
    this->clear_sums(v);
    this->for_tiles(v, [&](int64_t t, int64_t n) { make_exponentials(v, b, head, t, n, block.sums); });
  }

  void make_exponentials(int v, int64_t b, int64_t head, int64_t t, int64_t n, A* sums) {
    this->score(v, b, head, t, n);
    this->for_lane_groups(v, [&](int64_t c) {
      this->table.word_exponentials(this->lane_group(v, c, t, n), this->words.key_word[v] + t,
                                    this->blocks[v].max + c * kLanes, sums ? sums + c * kLanes : nullptr);
    });
  }

  // Adds the products of the dS^T of a tile, which the scores hold.
  void add_products(int v, int64_t t, int64_t n, bool of_queries, bool of_keys, bool accumulate) {
    auto& block = this->blocks[v];
    const int64_t rows = block.padded, ld = this->ld;
    A* to = grad_keys[v] + t * ld;
    if constexpr (P::kInPairs) {
      this->products.round(block.scores, kScoresLd, n, rows, of_keys ? left_ : nullptr, of_queries ? right_ : nullptr);
      if (of_queries) this->keys.add_to_grad_queries(v, t, n, right_, rows, rows, grad_queries_t, accumulate);
      if (of_keys) this->products.multiply(n, ld, rows, left_, rows, block.as_rows, ld, to, ld, true);
    } else {
      if (of_queries)
        this->keys.add_to_grad_queries(v, t, n, block.scores, kScoresLd, rows, grad_queries_t, accumulate);
      if (of_keys) this->products.multiply(n, ld, rows, block.scores, kScoresLd, block.as_rows, ld, to, ld, true);
    }
  }

 private:
  Operand *left_, *right_;
};

// The gradients of the loaded block of view v, whose sums are made; its strip begins with the shared word `begin`.
template <typename P>
void backward_block(WordBackward<P>& task, int v, int64_t b, int64_t head, int64_t begin, const QKGradients& out) {
  using A = typename P::Accumulator;
  const auto& p = task.inputs;
  auto& block = task.blocks[v];
  task.spread(v, begin, task.of_maps[v], p.scale, task.of_sums);
  task.for_lane_groups(v, [&](int64_t c) {
    task.table.word_dots(task.of_sums + c * kLanes, block.sums + c * kLanes, task.words.no_word, kScoresLd,
                         block.inverse + c * kLanes, task.d + c * kLanes);
  });
  bool first_tile = true;
  task.for_tiles(v, [&](int64_t t, int64_t n) {
    if (!task.in_one_tile(v)) task.make_exponentials(v, b, head, t, n, nullptr);
    task.for_lane_groups(v, [&](int64_t c) {
      task.table.word_gradient(task.lane_group(v, c, t, n), task.words.key_word[v] + t, task.of_sums + c * kLanes,
                               task.d + c * kLanes);
    });
    task.add_products(v, t, n, out.query[v].data, out.key[v].data, !first_tile);
    first_tile = false;
  });
  if (!out.query[v].data) return;
  if (first_tile) std::fill_n(task.grad_queries_t, task.ld * block.padded, A(0));
  task.table.transpose(task.grad_queries_t, block.padded, task.ld, block.padded, task.grad_queries, task.ld);
  task.table.scatter_rows(task.grad_queries, task.ld, block.n, p.dim, p.kind, out.query[v].row_stride,
                          task.words.query[v] + block.first, out.query[v].head(b, head));
}

template <typename P>
void make_gradients_of(const WordInputs& p, const Tensor& grad_sums, const Tensor& row_stats, const QKGradients& out) {
  using A = typename P::Accumulator;
  const P products(selection());
  const A *upstream = grad_sums.data_ptr<A>(), *saved = row_stats.data_ptr<A>();
  run<WordBackward<P>>(p, products, Plan(p, 1), [&](WordBackward<P>& task, const Share& share) {
    const int64_t b = share.b, ld = task.ld;
    task.pack_keys(b, share.key_head, out.query[0].data || out.query[1].data);
    for (int v = 0; v < 2; ++v)
      if (out.key[v].data) std::fill_n(task.grad_keys[v], task.keys.padded * ld, A(0));
    for_strips(task, share, [&](int64_t head, int64_t begin, int64_t end) {
      for (int v = 0; v < 2; ++v) {
        std::fill_n(task.maps[v], (end - begin) * task.words.rows, A(0));
        task.for_blocks(v, b, head, begin, end, [&] {
          task.sum_words(v, b, head, saved);
          task.add_to_maps(v, begin);
        });
      }
      const bool wanted[2] = {out.query[0].data || out.key[0].data, out.query[1].data || out.key[1].data};
      task.loops.gradients(task.maps[0], task.maps[1], end - begin, task.words.rows, upstream[b * p.heads + head],
                           wanted[0] ? task.of_maps[0] : nullptr, wanted[1] ? task.of_maps[1] : nullptr);
      for (int v = 0; v < 2; ++v) {
        if (!wanted[v]) continue;
        if (task.in_one_block(v, begin, end)) {
          backward_block(task, v, b, head, begin, out);
        } else {
          task.for_blocks(v, b, head, begin, end, [&] {
            task.sum_words(v, b, head, saved);
            backward_block(task, v, b, head, begin, out);
          });
        }
      }
    });
    for (int v = 0; v < 2; ++v)
      if (out.key[v].data)
        task.table.scatter_rows(task.grad_keys[v], ld, task.counted.n_keys, p.dim, p.kind, out.key[v].row_stride,
                                task.counted.key, out.key[v].head(b, share.key_head));
  });
}

void check_ids(const char* op, const WordInputs& inputs) {
  const int64_t* ids = inputs.word_ids.data_ptr<int64_t>();
  for (int64_t i = 0; i < inputs.word_ids.numel(); ++i)
    TORCH_CHECK_VALUE(ids[i] < inputs.words, op, ": word_ids: expected numbers of less than words, ", inputs.words,
                      ", got ", ids[i]);
}

// One operator. kExchanged: the comparison takes the second view as its first one.
template <Comparison kComparison, bool kExchanged = false>
struct WordAttention {
  static const char* name() {
    switch (kComparison) {
      case Comparison::kMse:
        return "qk_word_attention_mse";
      case Comparison::kKl:
        return kExchanged ? "qk_word_attention_reverse_kl" : "qk_word_attention_kl";
      default:
        return "qk_word_attention_js";
    }
  }

  static std::tuple<Tensor, Tensor> forward(const WordsProblem& problem) {
    const WordInputs inputs(problem, check(name(), problem, kLimits), kComparison, kExchanged);
    check_ids(name(), inputs);
    const auto options = problem.query.options().dtype(accumulator_of(problem.query));
    Tensor sums = at::zeros({inputs.pairs, inputs.heads}, options);
    Tensor row_stats = at::zeros({kWordRowStats, inputs.pairs, inputs.heads, inputs.queries}, options);
    with_products(inputs.kind, [&]<typename P>() { make_sums<P>(inputs, sums, row_stats); });
    return {sums, row_stats};
  }

  static std::vector<Tensor> backward(const Tensor& grad_sums, const WordsProblem& problem, const Tensor& row_stats,
                                      const c10::List<bool>& needs) {
    const AttentionSizes sizes = check_backward(name(), problem, kLimits, grad_sums, row_stats, needs);
    const WordInputs inputs(problem, sizes, kComparison, kExchanged);
    check_ids(name(), inputs);
    Gradients gradients =
        make_gradients({{problem.query, problem.query_aug}, {problem.key, problem.key_aug}}, needs, inputs.pairs,
                       [](const Tensor& like) { return at::zeros(like.sizes(), like.options()); });
    QKGradients out;
    for (int v = 0; v < 2; ++v) {
      out.query[v] = HeadsPointer(gradients.views[0][inputs.view_of_problem(v)]);
      out.key[v] = HeadsPointer(gradients.views[1][inputs.view_of_problem(v)]);
    }
    const Tensor upstream = grad_sums.to(accumulator_of(problem.query)).contiguous(), saved = row_stats.contiguous();
    with_products(inputs.kind, [&]<typename P>() { make_gradients_of<P>(inputs, upstream, saved, out); });
    return gradients.returned;
  }

  static void add_to(torch::Library& library) {
    register_operator<&forward, &backward>(library, name(), c10::DispatchKey::CPU);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(ear_ops, m) {
  WordAttention<Comparison::kMse>::add_to(m);
  WordAttention<Comparison::kKl>::add_to(m);
  WordAttention<Comparison::kKl, true>::add_to(m);
  WordAttention<Comparison::kJs>::add_to(m);
}

}  // namespace ear_ops::cpu
