// What forward and backward share: tiles of scores of one block of queries against one head's keys.
// Scores lie transposed, [keys, queries]. So a softmax needs no reduction across lanes, keys are multiplied where they
// lie in the tensor, and the products of the backward need no transposed scores.
#pragma once

#include "../isa.h"
#include "keys.h"
#include "queries.h"

namespace ear_ops::cpu {

constexpr int64_t kMostKept = 16 * kTile;       // keys whose scores stay for a second sweep
constexpr int64_t kScoresLd = kBlock + kLanes;  // an odd number of cache lines of floats: keys spread over all sets

// The working memory of one thread, used for many shares of the work. Calls come in this order, and each invalidates
// what the later ones left:
//   select(b)       `counted` is of pair b
//   pack_keys       `keys` are those of one key head of that pair
//   load_queries    `block` is one block of queries of one head that uses those keys
//   score(t, n)     scores_of(v, t)[j * kScoresLd + i] is the raw product of the block's i-th query and key t + j, in
//                   both views, for all padded queries; the bias lies likewise. Keys that only pad have zero scores.
// The functions of the table then replace the scores of each group of lanes by what comes of them. The scores of the
// last `kept` keys stay until then.
template <typename P>
class QKTask {
 public:
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  const QKInputs& inputs;
  const P& products;
  const Kernels<A>& table;
  const ScoreLoops<A>& loops;  // of the comparison
  const int64_t ld;            // of packed rows
  Counted counted;
  PackedKeys<P> keys;
  QueryBlock<P> block;
  const int64_t kept;   // a multiple of kTile
  LaneStats<A>* stats;  // [kBlock / kLanes], of the block's queries

  // backward: with the operands of gradients.
  QKTask(const QKInputs& in, const P& p, Arena& arena, bool backward)
      : inputs(in),
        products(p),
        table(kernels<A>(*selection().isa)),
        loops(table.compare[static_cast<int>(in.comparison)]),
        ld(round_up(in.dim, P::kWidth)),
        counted(in, arena),
        keys(in, p, ld, backward, arena),
        block(in, p, ld, backward, arena),
        kept(!backward && loops.add_values ? kMostKept : kTile) {
    const int64_t rows = std::min(round_up(in.keys, P::kPadding), kept);
    stats = arena.take<LaneStats<A>>(kBlock / kLanes);
    for (int v = 0; v < 2; ++v) {
      scores_[v] = arena.take<A>(rows * kScoresLd);
      bias_[v] = arena.take<A>(in.bias[v].data ? rows * kScoresLd : 0);
    }
  }

  void select(int64_t b) { counted.select(inputs, b); }
  bool is_empty() const { return counted.n_keys == 0 || counted.n_queries == 0; }
  void pack_keys(int64_t b, int64_t key_head, bool transposed) { keys.pack(counted, b, key_head, transposed); }
  void load_queries(int64_t b, int64_t head, int64_t begin) { block.load(counted, b, head, begin, keys.padded); }

  A* scores_of(int v, int64_t t) const { return scores_[v] + t % kept * kScoresLd; }

  void score(int64_t b, int64_t head, int64_t t, int64_t n) {
    for (int v = 0; v < 2; ++v) {
      keys.score(v, t, n, block.as_columns(v), block.padded, scores_of(v, t), kScoresLd);
      if (inputs.bias[v].data) load_bias(v, b, head, t, n);
    }
  }

  // The c-th kLanes queries of the block, in the tile of the keys [t, t + n).
  LaneGroup<A> lane_group(int64_t c, int64_t t, int64_t n) {
    LaneGroup<A> group{};
    group.ld = kScoresLd, group.keys = std::min(n, counted.n_keys - t), group.scale = static_cast<A>(inputs.scale);
    for (int v = 0; v < 2; ++v) {
      group.scores[v] = scores_of(v, t) + c * kLanes;
      if (counted.masks_differ) group.real[v] = counted.real[v] + t;
      if (inputs.bias[v].data) group.bias[v] = bias_of(v, t) + c * kLanes;
    }
    if (!inputs.is_causal && !inputs.window) return group;
    for (int64_t i = 0; i < kLanes; ++i) {
      first_[i] = static_cast<A>(block.first_key[c * kLanes + i] - t);
      last_[i] = static_cast<A>(block.last_key[c * kLanes + i] - t);
      if (first_[i] > 0 || last_[i] < group.keys) group.first = first_, group.last = last_;
    }
    return group;
  }
  int64_t lane_groups() const { return block.padded / kLanes; }

  // Calls body(t, n) for the tiles that any query of the block attends to, of those that begin within [begin, end).
  template <typename Body>
  void for_tiles(int64_t begin, int64_t end, const Body& body) const {
    for (int64_t t = std::max(block.tile_begin, begin); t < std::min(block.tile_end, end); t += kTile)
      body(t, std::min(kTile, block.tile_end - t));
  }

 private:
  A *scores_[2], *bias_[2];
  alignas(64) A first_[kLanes], last_[kLanes];

  A* bias_of(int v, int64_t t) const { return bias_[v] + t % kept * kScoresLd; }

  void load_bias(int v, int64_t b, int64_t head, int64_t t, int64_t n) {
    const int64_t real = std::min(n, counted.n_keys - t);
    A* to = bias_of(v, t);
    for (int64_t i = 0; i < block.padded; ++i) {
      const A* from = i < block.n ? block.bias_row(counted, v, b, head, i) : nullptr;
      for (int64_t j = 0; j < real; ++j)
        to[j * kScoresLd + i] =
            from ? from[counted.key[t + j] * inputs.bias_key_stride[v]] : -std::numeric_limits<A>::infinity();
    }
  }
};

}  // namespace ear_ops::cpu
