// The averages over the heads: tiles of scores of all heads of both views, for one block of queries. Scores lie as in
// task.h.
#pragma once

#include "../isa.h"
#include "mean_inputs.h"
#include "queries.h"

namespace ear_ops::cpu {

constexpr int64_t kMeanLd = kBlock + kLanes;  // an odd number of cache lines of floats, as kScoresLd

// Of one view. Arrays of heads lie one behind the other.
template <typename P>
struct MeanView {
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  int64_t ld;                     // of packed rows
  Operand *keys, *keys_t;         // [key_heads, keys, ld] and [key_heads, ld, keys], where keys are padded
  Operand *columns, *rows;        // [heads, ld, kBlock] and [heads, kBlock, ld], the queries of the block
  A* scores;                      // [heads, kept keys, kMeanLd] and a cache line
  A *sum, *top;                   // [kept keys, kMeanLd], of the averages
  A *max, *sum_of_row, *inverse;  // [heads, kBlock]: of the softmax of a row
  A *factors, *d;                 // [heads, kBlock]: f and d
};

// The working memory of one thread. Calls come in this order, and each invalidates what the later ones left:
//   select(b)       the keys of all heads of pair b
//   load_queries    a block of queries of all heads
//   softmaxes       max, inverse and factors of the block
//   average(t, n)   e_h of all heads for the keys [t, t + n) and the sums of f_h e_h, unless softmaxes left both
//   compare         the slopes in place of the sums
// Where rows are kept, the latter two leave what they made of all keys of the row, else of the last tile alone. Heads
// with a weight of 0 are left out of everything.
template <typename P>
class MeanTask {
 public:
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  const MeanInputs& inputs;
  const P& products;
  const Kernels<A>& table;
  const MeanLoops<A>& loops;
  const bool logarithms;  // whether the comparison takes those of the averages
  Counted counted;
  KeyBounds bounds;
  int64_t first = 0, n_queries = 0, padded_queries = 0;  // of the block, as in QueryBlock
  const bool gradients;                                  // whether any are wanted
  bool keeps_rows;                                       // all keys of a block's rows stay in memory
  int64_t padded_keys = 0;
  int64_t tile, wide_tile;  // keys of all heads at a time, and of one head
  MeanView<P> views[2];

  MeanTask(const MeanInputs& in, const P& p, Arena& arena, bool wanted)
      : inputs(in),
        products(p),
        table(kernels<A>(*selection().isa)),
        loops(table.mean),
        logarithms(in.comparison == Comparison::kKl),
        counted(in, arena),
        gradients(wanted) {
    const int64_t all = round_up(in.keys, P::kPadding), block = round_up(std::min(in.queries, kBlock), P::kPadding);
    // Scores of all heads stay in the cache of a core.
    constexpr int64_t kRows = 1536;
    tile = std::clamp<int64_t>(kRows / (in.view[0].heads + in.view[1].heads) / kBlock * kBlock, kBlock, kTile);
    tile = std::min(tile, std::max<int64_t>(all, P::kPadding));
    all_ = all, rows_ = block;
    constexpr int64_t kMostKept = int64_t(1) << 24;  // bytes
    const int64_t whole_rows = (in.view[0].heads + in.view[1].heads) * all * kMeanLd * static_cast<int64_t>(sizeof(A));
    keeps_rows = whole_rows <= kMostKept;
    kept_ = keeps_rows ? all : tile;
    wide_tile = keeps_rows ? std::min(kTile, std::max<int64_t>(all, P::kPadding)) : tile;
    for (int v = 0; v < 2; ++v) {
      const ViewInputs& of = in.view[v];
      MeanView<P>& view = views[v];
      view.ld = round_up(of.dim, P::kWidth);
      view.keys = arena.take<Operand>(of.key_heads * all * view.ld);
      view.keys_t = arena.take<Operand>(gradients * of.key_heads * all * view.ld);
      view.columns = arena.take<Operand>(of.heads * block * view.ld);
      view.rows = arena.take<Operand>((gradients ? of.heads : 1) * block * view.ld);
      view.scores = arena.take<A>(of.heads * head_stride());
      view.sum = arena.take<A>(kept_ * kMeanLd);
      view.top = arena.take<A>(logarithms * kept_ * kMeanLd);
      for (A** of_heads : {&view.max, &view.sum_of_row, &view.inverse, &view.factors, &view.d})
        *of_heads = arena.take<A>(of.heads * kBlock);
    }
    const int64_t widest = std::max(views[0].ld, views[1].ld);
    gathered_ = arena.take<Operand>(P::kInPairs * block * widest);
    bias_ = arena.take<A>(in.view[0].bias.data ? wide_tile * kMeanLd : 0);
  }

  void select(int64_t b) {
    b_ = b;
    counted.select(inputs, b);
    padded_keys = round_up(counted.n_keys, P::kPadding);
    for (int v = 0; v < 2; ++v) {
      const ViewInputs& of = inputs.view[v];
      for (int64_t head = 0; head < of.key_heads; ++head) {
        Operand* keys = keys_of(v, head);
        products.gather(of.key.head(b, head), inputs.kind, of.key.row_stride, counted.key, inputs.key_mask_of(v, b),
                        counted.n_keys, padded_keys, of.dim, views[v].ld, keys);
        if (gradients) products.transpose(keys, views[v].ld, padded_keys, views[v].ld, keys_t_of(v, head), padded_keys);
      }
    }
  }
  bool is_empty() const { return counted.n_keys == 0 || counted.n_queries == 0; }

  void load_queries(int64_t begin) {
    first = begin;
    n_queries = std::min(kBlock, counted.n_queries - begin);
    padded_queries = round_up(n_queries, P::kPadding);
    bounds.bound_keys(inputs, counted, counted.query + first, n_queries, padded_keys);
    for_heads([&](int v, int64_t head) {
      const ViewInputs& of = inputs.view[v];
      const int64_t ld = views[v].ld;
      Operand* rows = P::kInPairs ? gathered_ : rows_of(v, head);
      products.gather(of.query.head(b_, head), inputs.kind, of.query.row_stride, counted.query + begin, nullptr,
                      n_queries, padded_queries, of.dim, ld, rows);
      products.columns(rows, ld, padded_queries, ld, columns_of(v, head));
      if constexpr (P::kInPairs) {
        if (gradients) products.pair_rows(rows, ld, padded_queries, ld, rows_of(v, head));
      }
    });
  }

  // Where exponentials take the place of scores, also adds them to the averages, while they are in the cache.
  void softmaxes() {
    if (exponentiates_rows()) for_tiles(wide_tile, [&](int64_t t, int64_t n) { clear_averages(t, n); });
    for_heads([&](int v, int64_t head) {
      A *max = of_head(views[v].max, head), *sum = of_head(views[v].sum_of_row, head);
      std::fill_n(max, kBlock, -std::numeric_limits<A>::infinity());
      std::fill_n(sum, kBlock, A(0));
      for_tiles(wide_tile, [&](int64_t t, int64_t n) {
        multiply(v, head, t, n);
        load_bias(v, head, t, n);
        for (int64_t c = 0; c < lane_groups(); ++c) {
          const LaneGroup<A> group = lane_group(v, head, c, t, n);
          if (exponentiates_rows()) {
            loops.raise_max(group, max + c * kLanes);
          } else {
            loops.add_softmax(group, max + c * kLanes, sum + c * kLanes);
          }
        }
      });
      for (int64_t c = 0; c < lane_groups(); ++c) {
        if (exponentiates_rows())
          for_tiles(wide_tile, [&](int64_t t, int64_t n) {
            loops.exponentiate(lane_group(v, head, c, t, n), max + c * kLanes, sum + c * kLanes);
          });
        for (int64_t i = c * kLanes; i < (c + 1) * kLanes; ++i) {
          const bool empty = i >= n_queries || (max[i] == -std::numeric_limits<A>::infinity() && !has_key(v, head, i));
          set_row(v, head, i, max[i], empty ? A(0) : 1 / sum[i]);
        }
        if (exponentiates_rows())
          for_tiles(wide_tile, [&](int64_t t, int64_t n) {
            loops.add_exponentials(exponentials(v, head, c, t, n), of_head(views[v].factors, head) + c * kLanes,
                                   sum_of(v, t) + c * kLanes);
          });
      }
    });
    if (inputs.comparison == Comparison::kKl) leave_out_rows_without_target();
  }

  void average(int64_t t, int64_t n) {
    if (exponentiates_rows()) return;
    clear_averages(t, n);
    for_heads([&](int v, int64_t head) {
      if (!keeps_rows) multiply(v, head, t, n);
      load_bias(v, head, t, n);
      for (int64_t c = 0; c < lane_groups(); ++c) {
        const A* max = of_head(views[v].max, head) + c * kLanes;
        if (logarithms) {
          loops.raise_top(lane_group(v, head, c, t, n), max, top_of(v, t) + c * kLanes);
        } else {
          loops.add_head(lane_group(v, head, c, t, n), max, of_head(views[v].factors, head) + c * kLanes, nullptr,
                         sum_of(v, t) + c * kLanes);
        }
      }
    });
    if (!logarithms) return;
    for_heads([&](int v, int64_t head) {
      for (int64_t c = 0; c < lane_groups(); ++c)
        loops.add_head(exponentials(v, head, c, t, n), nullptr, of_head(views[v].factors, head) + c * kLanes,
                       top_of(v, t) + c * kLanes, sum_of(v, t) + c * kLanes);
    });
  }

  // Returns the sum of the entries of the averages that are loaded.
  double compare(int64_t t, int64_t n) {
    double total = 0;
    for (int64_t c = 0; c < lane_groups(); ++c) {
      Averages<A> averages{};
      for (int v = 0; v < 2; ++v) {
        averages.sum[v] = sum_of(v, t) + c * kLanes;
        if (logarithms) averages.top[v] = top_of(v, t) + c * kLanes;
        averages.divisor[v] = static_cast<A>(inputs.divisor(v));
      }
      averages.ld = kMeanLd, averages.keys = real_keys(t, n);
      total += loops.compare[static_cast<int>(inputs.comparison)](averages);
    }
    return total;
  }

  // Returns the sum over the rows of the block. Where the rows are not kept, also leaves d of each for the gradients.
  double compare_rows() {
    const bool sums_slopes = gradients && !keeps_rows;
    if (sums_slopes) for_heads([&](int v, int64_t head) { std::fill_n(of_head(views[v].d, head), kBlock, A(0)); });
    double total = 0;
    for_tiles(tile, [&](int64_t t, int64_t n) {
      average(t, n);
      total += compare(t, n);
      if (sums_slopes) for_heads([&](int v, int64_t head) { add_slopes(v, head, t, n); });
    });
    if (sums_slopes) for_heads([&](int v, int64_t head) { finish_slopes(v, head); });
    return total;
  }

  // Of the rows of a head that are kept: d.
  void sum_slopes(int v, int64_t head) {
    std::fill_n(of_head(views[v].d, head), kBlock, A(0));
    for_tiles(wide_tile, [&](int64_t t, int64_t n) { add_slopes(v, head, t, n); });
    finish_slopes(v, head);
  }

  // The c-th kLanes queries of e_h, without masks.
  LaneGroup<A> exponentials(int v, int64_t head, int64_t c, int64_t t, int64_t n) const {
    LaneGroup<A> group{};
    group.scores[0] = scores_of(v, head, t) + c * kLanes;
    group.ld = kMeanLd, group.keys = real_keys(t, n), group.scale = static_cast<A>(inputs.view[v].scale);
    return group;
  }

  template <typename Body>
  void for_heads(const Body& body) const {
    for (int v = 0; v < 2; ++v)
      for (int64_t head = 0; head < inputs.view[v].heads; ++head)
        if (inputs.weight(head) != 0) body(v, head);
  }
  template <typename Body>
  void for_tiles(int64_t size, const Body& body) const {
    for (int64_t t = bounds.tile_begin; t < bounds.tile_end; t += size) body(t, std::min(size, bounds.tile_end - t));
  }

  int64_t lane_groups() const { return padded_queries / kLanes; }
  int64_t real_keys(int64_t t, int64_t n) const { return std::min(n, counted.n_keys - t); }
  int64_t key_head(int v, int64_t head) const { return head / inputs.view[v].group(); }
  Operand* keys_of(int v, int64_t head) const { return views[v].keys + head * all_ * views[v].ld; }
  Operand* keys_t_of(int v, int64_t head) const { return views[v].keys_t + head * all_ * views[v].ld; }
  Operand* columns_of(int v, int64_t head) const { return views[v].columns + head * rows_ * views[v].ld; }
  Operand* rows_of(int v, int64_t head) const { return views[v].rows + (gradients ? head : 0) * rows_ * views[v].ld; }
  A* scores_of(int v, int64_t head, int64_t t) const { return views[v].scores + head * head_stride() + row_of(t); }
  A* sum_of(int v, int64_t t) const { return views[v].sum + row_of(t); }
  A* top_of(int v, int64_t t) const { return views[v].top + row_of(t); }
  A* of_head(A* rows, int64_t head) const { return rows + head * kBlock; }

 private:
  int64_t b_ = 0, all_, rows_, kept_;
  Operand* gathered_;
  A* bias_;
  alignas(64) A first_[kLanes], last_[kLanes];

  // Whether exponentials take the place of scores before there are averages, which is when logarithms need scores.
  bool exponentiates_rows() const { return keeps_rows && !logarithms; }
  int64_t row_of(int64_t t) const { return keeps_rows ? t * kMeanLd : 0; }

  // Heads lie a cache line further apart than a power of two, so that they spread over the sets of the cache.
  int64_t head_stride() const { return kept_ * kMeanLd + kLanes; }

  void clear_averages(int64_t t, int64_t n) {
    for (int v = 0; v < 2; ++v) {
      std::fill_n(sum_of(v, t), n * kMeanLd, A(0));
      if (logarithms) std::fill_n(top_of(v, t), n * kMeanLd, -std::numeric_limits<A>::infinity());
    }
  }

  void add_slopes(int v, int64_t head, int64_t t, int64_t n) {
    for (int64_t c = 0; c < lane_groups(); ++c)
      loops.add_slopes(exponentials(v, head, c, t, n), sum_of(v, t) + c * kLanes,
                       of_head(views[v].d, head) + c * kLanes);
  }

  void finish_slopes(int v, int64_t head) {
    A* d = of_head(views[v].d, head);
    const A* inverse = of_head(views[v].inverse, head);
    for (int64_t i = 0; i < padded_queries; ++i) d[i] = inverse[i] == 0 ? A(0) : d[i] * inverse[i];
  }

  void set_row(int v, int64_t head, int64_t i, A max, A inverse) {
    of_head(views[v].max, head)[i] = max;
    of_head(views[v].inverse, head)[i] = inverse;
    of_head(views[v].factors, head)[i] = static_cast<A>(inputs.weight(head)) * inverse;
  }

  // KL is 0 in a row in which no head of the target has a key.
  void leave_out_rows_without_target() {
    for (int64_t i = 0; i < n_queries; ++i) {
      bool has_target = false;
      for_heads([&](int v, int64_t head) { has_target |= v == 1 && of_head(views[1].inverse, head)[i] != 0; });
      if (has_target) continue;
      for_heads([&](int v, int64_t head) {
        if (v == 0) set_row(0, head, i, of_head(views[0].max, head)[i], A(0));
      });
    }
  }

  bool has_key(int v, int64_t head, int64_t i) const {
    const ViewInputs& of = inputs.view[v];
    const A* bias = of.bias.data ? bias_row(v, head, i) : nullptr;
    for (int64_t j = bounds.first_key[i]; j < bounds.last_key[i]; ++j) {
      if (counted.masks_differ && !counted.real[v][j]) continue;
      if (!bias || bias[counted.key[j] * of.bias_key_stride] != -std::numeric_limits<A>::infinity()) return true;
    }
    return false;
  }

  const A* bias_row(int v, int64_t head, int64_t i) const {
    const HeadsPointer& bias = inputs.view[v].bias;
    return reinterpret_cast<const A*>(bias.head(b_, head)) + counted.query[first + i] * bias.row_stride;
  }

  // The raw scores of a head for the keys [t, t + n).
  void multiply(int v, int64_t head, int64_t t, int64_t n) {
    const int64_t ld = views[v].ld;
    products.multiply(n, padded_queries, ld, keys_of(v, key_head(v, head)) + t * ld, ld, columns_of(v, head),
                      padded_queries, scores_of(v, head, t), kMeanLd, false);
  }

  void load_bias(int v, int64_t head, int64_t t, int64_t n) {
    if (!inputs.view[v].bias.data) return;
    for (int64_t i = 0; i < padded_queries; ++i) {
      const A* from = i < n_queries ? bias_row(v, head, i) : nullptr;
      for (int64_t j = 0; j < real_keys(t, n); ++j)
        bias_[j * kMeanLd + i] =
            from ? from[counted.key[t + j] * inputs.view[v].bias_key_stride] : -std::numeric_limits<A>::infinity();
    }
  }

  // The c-th kLanes queries of raw scores, with the masks.
  LaneGroup<A> lane_group(int v, int64_t head, int64_t c, int64_t t, int64_t n) {
    LaneGroup<A> group = exponentials(v, head, c, t, n);
    if (counted.masks_differ) group.real[0] = counted.real[v] + t;
    if (inputs.view[v].bias.data) group.bias[0] = bias_ + c * kLanes;
    if (!inputs.is_causal && !inputs.window) return group;
    for (int64_t i = 0; i < kLanes; ++i) {
      first_[i] = static_cast<A>(bounds.first_key[c * kLanes + i] - t);
      last_[i] = static_cast<A>(bounds.last_key[c * kLanes + i] - t);
      if (first_[i] > 0 || last_[i] < group.keys) group.first = first_, group.last = last_;
    }
    return group;
  }
};

}  // namespace ear_ops::cpu
