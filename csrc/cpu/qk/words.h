// Attention between words: the words of one pair, and blocks of queries of each view.
#pragma once

#include "../isa.h"
#include "keys.h"
#include "queries.h"
#include "task.h"

namespace ear_ops::cpu {

struct WordInputs : QKInputs {
  Tensor word_ids;  // contiguous [2B, L]
  int64_t words;    // every word id is less

  WordInputs(const WordsProblem& problem, const AttentionSizes& sizes, Comparison comparison, bool exchanged)
      : QKInputs(problem.tokens(), sizes, comparison, exchanged),
        word_ids(problem.word_ids.contiguous()),
        words(problem.words) {}

  const int64_t* ids(int v, int64_t b) const {
    return word_ids.data_ptr<int64_t>() + (view_of_problem(v) * pairs + b) * queries;
  }
  // Rows of sums over the keys of a word: at most one for each token of both views, and one for keys without a word.
  int64_t max_rows() const { return round_up(std::min(words, 2 * queries) + 1, kLanes); }
};

// The words of one pair. Every word that either view has is numbered, in the order of the ids; a word of both views is
// shared. Between calls of select, the queries of view v that belong to the k-th shared word are
// query[v][begin[v][k], begin[v][k + 1]).
struct PairWords {
  int64_t n_shared = 0;
  int64_t no_word = 0;   // what stands for the number of a word where a key has none
  int64_t rows = 0;      // of sums over the keys of a word: one for each number and for no_word, padded to kLanes
  int32_t* key_word[2];  // of each counted key, the number of its word in the view
  int32_t* query[2];     // positions in the tensors
  int32_t* begin[2];

  PairWords(const WordInputs& inputs, Arena& arena) : number_(arena.take<int32_t>(inputs.words)) {
    for (int v = 0; v < 2; ++v) {
      key_word[v] = arena.take<int32_t>(inputs.keys);
      query[v] = arena.take<int32_t>(inputs.queries);
      begin[v] = arena.take<int32_t>(inputs.queries + 1);
      pieces_[v] = arena.take<int32_t>(inputs.words);
      next_[v] = arena.take<int32_t>(inputs.words);
    }
  }

  void select(const WordInputs& inputs, const Counted& counted, int64_t b) {
    const int64_t* ids[2] = {inputs.ids(0, b), inputs.ids(1, b)};
    const uint8_t* real[2] = {inputs.key_mask_of(0, b), inputs.key_mask_of(1, b)};
    const auto has_word = [&](int v, int64_t i) { return ids[v][i] >= 0 && (!real[v] || real[v][i]); };
    for (int v = 0; v < 2; ++v) {
      std::fill_n(pieces_[v], inputs.words, 0);
      for (int64_t i = 0; i < inputs.queries; ++i)
        if (has_word(v, i)) ++pieces_[v][ids[v][i]];
    }
    int32_t words = 0;
    n_shared = 0;
    begin[0][0] = begin[1][0] = 0;
    for (int64_t w = 0; w < inputs.words; ++w) {
      number_[w] = words;
      words += pieces_[0][w] || pieces_[1][w];
      next_[0][w] = next_[1][w] = kNotShared;
      if (!pieces_[0][w] || !pieces_[1][w]) continue;
      for (int v = 0; v < 2; ++v) {
        next_[v][w] = begin[v][n_shared];
        begin[v][n_shared + 1] = begin[v][n_shared] + pieces_[v][w];
      }
      ++n_shared;
    }
    no_word = words;
    rows = round_up(words + 1, kLanes);
    for (int v = 0; v < 2; ++v) {
      for (int64_t i = 0; i < inputs.queries; ++i)
        if (has_word(v, i) && next_[v][ids[v][i]] != kNotShared)
          query[v][next_[v][ids[v][i]]++] = static_cast<int32_t>(i);
      for (int64_t j = 0; j < counted.n_keys; ++j) {
        const int64_t position = counted.key[j];
        key_word[v][j] = has_word(v, position) ? number_[ids[v][position]] : words;
      }
    }
  }

  int64_t pieces(int v, int64_t k) const { return begin[v][k + 1] - begin[v][k]; }

  // The end of the strip of shared words that begins with the k-th one: as many as have at most kBlock queries in each
  // view, at least one.
  int64_t strip_end(int64_t k) const {
    int64_t end = k + 1;
    while (end < n_shared && begin[0][end + 1] - begin[0][k] <= kBlock && begin[1][end + 1] - begin[1][k] <= kBlock)
      ++end;
    return end;
  }

 private:
  static constexpr int32_t kNotShared = -1;
  int32_t* number_;     // [words]
  int32_t* pieces_[2];  // [words]
  int32_t* next_[2];    // [words], where in `query` the word's next one goes
};

// The working memory of one thread. select(b) comes first, then pack_keys, then blocks of queries: those of view v are
// loaded, scored and summed up, and stay until the next load of that view.
template <typename P>
class WordTask {
 public:
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;

  const WordInputs& inputs;
  const P& products;
  const Kernels<A>& table;
  const MapLoops<A>& loops;  // of the comparison
  const int64_t ld;          // of packed rows
  Counted counted;
  PairWords words;
  PackedKeys<P> keys;

  // A block of n queries of one view, from the `first`-th of its list on. Row w of sums [rows, kScoresLd] holds sums of
  // exponentials over the keys of word w.
  struct Block {
    int64_t first, n, padded;
    int64_t tile_begin, tile_end;
    int64_t first_key[kBlock], last_key[kBlock];  // by position alone, a query may attend to the keys between
    Operand *rows, *columns, *paired;
    A *scores, *bias, *sums;
    A *max, *inverse;        // [kBlock] of the softmax
    const Operand* as_rows;  // right operand of a product, rows `ld` apart
  };
  Block blocks[2];
  WordRows<A>* stats;  // [kBlock / kLanes]
  A* maps[2];          // [kBlock, rows] of each view: rows of a strip's words
  A* token_rows;       // [kBlock, rows]

  WordTask(const WordInputs& in, const P& p, Arena& arena, bool backward)
      : inputs(in),
        products(p),
        table(kernels<A>(*selection().isa)),
        loops(table.compare_maps[static_cast<int>(in.comparison)]),
        ld(round_up(in.dim, P::kWidth)),
        counted(in, arena),
        words(in, arena),
        keys(in, p, ld, backward, arena),
        backward_(backward) {
    const int64_t kept = std::min(round_up(in.keys, P::kPadding), kTile), of_words = in.max_rows();
    const int64_t rows = round_up(std::min(in.queries, kBlock), P::kPadding);
    for (int v = 0; v < 2; ++v) {
      Block& block = blocks[v];
      block.rows = arena.take<Operand>(rows * ld);
      block.columns = arena.take<Operand>(rows * ld);
      block.paired = arena.take<Operand>(P::kInPairs && backward ? rows * ld : 0);
      block.scores = arena.take<A>(kept * kScoresLd);
      block.bias = arena.take<A>(in.bias[v].data ? kept * kScoresLd : 0);
      block.sums = arena.take<A>(of_words * kScoresLd);
      block.max = arena.take<A>(kBlock);
      block.inverse = arena.take<A>(kBlock);
      maps[v] = arena.take<A>(kBlock * of_words);
    }
    stats = arena.take<WordRows<A>>(kBlock / kLanes);
    token_rows = arena.take<A>(kBlock * of_words);
  }

  void select(int64_t b) {
    counted.select(inputs, b);
    words.select(inputs, counted, b);
  }
  bool is_empty() const { return counted.n_keys == 0 || words.n_shared == 0; }
  void pack_keys(int64_t b, int64_t key_head, bool transposed) { keys.pack(counted, b, key_head, transposed); }

  // Loads the queries of view v from the `first`-th to the last of the k-th shared word, at most kBlock.
  void load(int v, int64_t b, int64_t head, int64_t first, int64_t last_word) {
    Block& block = blocks[v];
    block.first = first;
    block.n = std::min<int64_t>(kBlock, words.begin[v][last_word + 1] - first);
    block.padded = round_up(block.n, P::kPadding);
    products.gather(inputs.query[v].head(b, head), inputs.kind, inputs.query[v].row_stride, words.query[v] + first,
                    nullptr, block.n, block.padded, inputs.dim, ld, block.rows);
    products.columns(block.rows, ld, block.padded, ld, block.columns);
    block.as_rows = block.rows;
    if constexpr (P::kInPairs) {
      if (backward_) products.pair_rows(block.rows, ld, block.padded, ld, block.paired);
      block.as_rows = block.paired;
    }
    bound_keys(v);
  }

  // Raw scores of the tile of the keys [t, t + n).
  void score(int v, int64_t b, int64_t head, int64_t t, int64_t n) {
    Block& block = blocks[v];
    keys.score(v, t, n, block.columns, block.padded, block.scores, kScoresLd);
    if (!inputs.bias[v].data) return;
    const int64_t real = std::min(n, counted.n_keys - t);
    const A* head_bias = reinterpret_cast<const A*>(inputs.bias[v].head(b, head));
    for (int64_t i = 0; i < block.padded; ++i) {
      const A* from = i < block.n ? head_bias + query(v, i) * inputs.bias[v].row_stride : nullptr;
      for (int64_t j = 0; j < real; ++j)
        block.bias[j * kScoresLd + i] =
            from ? from[counted.key[t + j] * inputs.bias_key_stride[v]] : -std::numeric_limits<A>::infinity();
    }
  }

  // The c-th kLanes queries of the block of view v, in the tile of the keys [t, t + n), as the first view.
  LaneGroup<A> lane_group(int v, int64_t c, int64_t t, int64_t n) {
    const Block& block = blocks[v];
    LaneGroup<A> group{};
    group.ld = kScoresLd, group.keys = std::min(n, counted.n_keys - t), group.scale = static_cast<A>(inputs.scale);
    group.scores[0] = block.scores + c * kLanes;
    if (counted.masks_differ) group.real[0] = counted.real[v] + t;
    if (inputs.bias[v].data) group.bias[0] = block.bias + c * kLanes;
    if (!inputs.is_causal && !inputs.window) return group;
    for (int64_t i = 0; i < kLanes; ++i) {
      first_[i] = static_cast<A>(block.first_key[c * kLanes + i] - t);
      last_[i] = static_cast<A>(block.last_key[c * kLanes + i] - t);
      if (first_[i] > 0 || last_[i] < group.keys) group.first = first_, group.last = last_;
    }
    return group;
  }

  // Calls body(c) for the lane groups of the block of view v.
  template <typename Body>
  void for_lane_groups(int v, const Body& body) const {
    for (int64_t c = 0; c < blocks[v].padded / kLanes; ++c) body(c);
  }

  // Calls body(t, n) for the tiles that any query of the block attends to.
  template <typename Body>
  void for_tiles(int v, const Body& body) const {
    for (int64_t t = blocks[v].tile_begin; t < blocks[v].tile_end; t += kTile)
      body(t, std::min(kTile, blocks[v].tile_end - t));
  }
  bool in_one_tile(int v) const { return blocks[v].tile_end - blocks[v].tile_begin <= kTile; }

  void clear_sums(int v) { std::fill_n(blocks[v].sums, words.rows * kScoresLd, A(0)); }

  // Calls body() for the blocks of the words [begin, end) of view v, each of which is loaded.
  template <typename Body>
  void for_blocks(int v, int64_t b, int64_t head, int64_t begin, int64_t end, const Body& body) {
    for (int64_t first = words.begin[v][begin]; first < words.begin[v][end]; first += kBlock) {
      load(v, b, head, first, end - 1);
      body();
    }
  }
  bool in_one_block(int v, int64_t begin, int64_t end) const {
    return words.begin[v][end] - words.begin[v][begin] <= kBlock;
  }

  // Adds the block's part of the means over the pieces of words to maps[v], whose first row is of the shared word
  // `begin`.
  void add_to_maps(int v, int64_t begin) {
    Block& block = blocks[v];
    std::fill_n(block.sums + words.no_word * kScoresLd, kScoresLd, A(0));
    table.transpose(block.sums, kScoresLd, words.rows, block.padded, token_rows, words.rows);
    find_words(v, begin, 1.0);
    table.add_to_rows(token_rows, block.n, words.rows, word_, factor_, maps[v]);
  }

  // Spreads gradients of the rows of maps[v] over the queries of its block, times `scale` and the softmax' inverse:
  // from of_maps [words of the strip, rows] to of_sums [rows, kScoresLd].
  void spread(int v, int64_t begin, const A* of_maps, double scale, A* of_sums) {
    Block& block = blocks[v];
    find_words(v, begin, scale);
    table.copy_from_rows(of_maps, block.n, words.rows, word_, factor_, token_rows);
    std::fill(token_rows + block.n * words.rows, token_rows + block.padded * words.rows, A(0));
    table.transpose(token_rows, words.rows, block.padded, words.rows, of_sums, kScoresLd);
  }

  int64_t query(int v, int64_t i) const { return words.query[v][blocks[v].first + i]; }

 private:
  const bool backward_;
  alignas(64) A first_[kLanes], last_[kLanes], factor_[kBlock];
  int32_t word_[kBlock];

  // Of each query of the block: its word, counted from `begin`, and its share of it times inverse and scale.
  void find_words(int v, int64_t begin, double scale) {
    const Block& block = blocks[v];
    int64_t k = begin;
    for (int64_t i = 0; i < block.n; ++i) {
      while (block.first + i >= words.begin[v][k + 1]) ++k;
      word_[i] = static_cast<int32_t>(k - begin);
      factor_[i] = static_cast<A>(scale / static_cast<double>(words.pieces(v, k)) * block.inverse[i]);
    }
  }

  void bound_keys(int v) {
    Block& block = blocks[v];
    const int32_t *begin = counted.key, *end = counted.key + counted.n_keys;
    block.tile_begin = keys.padded, block.tile_end = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      int64_t& from = block.first_key[i] = 0;
      int64_t& until = block.last_key[i] = i < block.n ? counted.n_keys : 0;
      if (i >= block.n) continue;
      const int64_t position = query(v, i);
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
      block.tile_begin = std::min(block.tile_begin, from / kTile * kTile);
      block.tile_end = std::max(block.tile_end, std::min(round_up(until, kTile), keys.padded));
    }
    block.tile_begin = std::min(block.tile_begin, block.tile_end);
  }
};

}  // namespace ear_ops::cpu
