// Attention between words: tiles of token attention, and their sums over words. For each pair and head,
//
//   M[i, j] = sum over the pieces q of i and k of j of P[q, k] / pieces(i)
//
// is made of both views for a strip of words i and another one of words j at a time (qk_word_strips.cuh). M is compared
// entry by entry, so that nothing of its size ever exists.
//
//   shared memory   a tile of queries and of keys of each view (qk_word_tokens.cuh)
//                     | mma
//   registers       scores of both views, 64 x 64 --> P
//   shared memory   P of both views
//                     | a thread sums the keys of each word, of one query; then the queries of each word, of one key
//   shared memory   pieces(i) M at the heads of words --> values, or slopes dv/dM / pieces(i) in its place
//                     | P is in registers still
//   registers       d, or dS (qk_words_backward.cuh)
//
// What the products cost: the forward makes every score twice, for the softmax and for M. The backward makes it three
// times: for d, for the queries' gradients, and for the keys'. That holds where the words of a strip fit a tile. A
// large strip, of one word of more tokens, needs all its tiles for M, and makes them again for what M is needed for;
// once for each tile that a block owns. Tiles that a causal mask or a window hides are made nevertheless. Head
// dimensions beyond kD come in chunks of kD features, as in qk_scores.cuh; a block makes all of this for the gradient
// of one chunk.
#pragma once

#include "qk_word_maps.cuh"
#include "qk_word_scores.cuh"

namespace ear_ops::cuda {

// Two strips of words, i and j, and where M of them lies in shared memory.
struct StripPair {
  Which i, j;
  bool large_rows, large;  // whether strip i is large, and whether one of both is
};

template <typename T, int kD, Role kOwner, int kKnown>
struct WordBlock : WordScores<T, kD, kOwner, kKnown> {
  using Scores = WordScores<T, kD, kOwner, kKnown>;
  using Memory = typename Scores::Memory;
  using Scores::a, Scores::chunks, Scores::kQueries, Scores::Scores;
  using Scores::attention, Scores::describe_map, Scores::head_of, Scores::large_sums, Scores::store, Scores::tile;
  using Scores::column_facts, Scores::row_facts, Scores::strip;
  static constexpr Which kRows = kQueries ? Which::kOwn : Which::kOther;
  static constexpr Which kColumns = kQueries ? Which::kOther : Which::kOwn;

  // --- sums over words ---

  // Which of the 64 tokens begin a word, or have none, a bit each. Those of one word follow each other.
  EAR_OPS_DEVICE void begins(Role role, int v, uint32_t (&bits)[2]) const {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const int token = w * kWarp + thread_index() % kWarp, head = head_of(role, v, token);
      bits[w] = ballot(head == token || head < 0);
    }
  }

  // Sums P over the keys of each word, and leaves the sum at the first key. A thread takes a query of a view.
  EAR_OPS_DEVICE void sum_keys() const {
    const int thread = thread_anew(), v = thread / kOwned, query = thread % kOwned;
    uint32_t bits[2];
    begins(Role::kKeys, v, bits);
    if ((bits[0] & bits[1]) == ~0u || query >= a.strip_tokens) return;
    float sum = 0;
#pragma unroll
    for (int w = 1; w >= 0; --w) {
      uint32_t begin = bits[w];
#pragma unroll 1
      for (int key = (w + 1) * kWarp - 4; key >= w * kWarp; key -= 4, begin <<= 4) {
        const FourFloats four = load_shared<FourFloats>(tile(v, query, key));
#pragma unroll
        for (int e = 3; e >= 0; --e) {
          sum += four.numbers[e];
          if (!(begin >> (28 + e) & 1)) continue;
          store_shared(tile(v, query, key + e), sum);
          sum = 0;
        }
      }
    }
  }

  // Sums that over the queries of each word, and leaves the sum at the first query. A thread takes a key of a view.
  EAR_OPS_DEVICE void sum_queries() const {
    const int thread = thread_anew(), v = thread / kOwned, key = thread % kOwned;
    uint32_t bits[2];
    begins(Role::kQueries, v, bits);
    if ((bits[0] & bits[1]) == ~0u) return;
    float sum = 0;
#pragma unroll
    for (int w = 1; w >= 0; --w) {
      uint32_t begin = bits[w];
#pragma unroll 4
      for (int query = (w + 1) * kWarp - 1; query >= w * kWarp; --query, begin <<= 1) {
        if (query >= a.strip_tokens) continue;
        sum += load_shared<float>(tile(v, query, key));
        if (!(begin >> 31)) continue;
        store_shared(tile(v, query, key), sum);
        sum = 0;
      }
    }
  }

  // Adds the sums of one tile to those of all tiles of large strips.
  EAR_OPS_DEVICE void add_to_large(const StripPair& of) const {
    const int thread = thread_anew(), v = thread / kOwned, place = thread % kOwned;
    // Keys that do not exist have no sum; a view may have fewer tiles than the other one.
    if (place >= a.strip_tokens || head_of(Role::kKeys, v, of.large_rows ? place : 0) < 0) return;
    float* const to = large_sums(v) + place;
    store_shared(to,
                 load_shared<float>(to) + load_shared<float>(of.large_rows ? tile(v, 0, place) : tile(v, place, 0)));
  }

  // Where M, or its slope, of two heads lies.
  EAR_OPS_DEVICE float* map(const StripPair& of, int v, int query, int key) const {
    return of.large ? large_sums(v) + query + key : tile(v, query, key);
  }

  // --- entries of M ---

  // Calls use(maps, row, column of this lane of 2, M of both views) for the entries of this lane, with the type of the
  // comparison. Rows that do not count are left out; a warp has every fourth row. kReplaces: `use` leaves in the place
  // of M what shall lie there instead, over the pieces of the row once more.
  template <bool kReplaces, typename Use>
  EAR_OPS_DEVICE void for_entries(const StripPair& of, const Use& use) const {
    const int thread = thread_anew(), lane = thread % kWarp, step = of.large ? 1 : Memory::kTileRow;
    const int first_column = strip(of.j).number, rows = strip(of.i).words;
    float* columns[2][2];           // of each column of this lane and view, where its head is
    bool exists[2][2], is_word[2];  // a token without a word has a column of slopes, which are 0
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = lane + c * kWarp;
      ColumnFacts facts{{kNoHead, kNoHead}};
      if (column < a.strip_tokens) facts = load_shared<ColumnFacts>(column_facts(column));
      is_word[c] = first_column + column > 0;
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        exists[c][v] = facts.place[v] >= 0;
        columns[c][v] = map(of, v, 0, exists[c][v] ? facts.place[v] : 0);
      }
    }
    with_maps(a.comparison, [&](auto maps) {
#pragma unroll 1
      for (int row = thread / kWarp; row < rows; row += kWarps) {
        const RowFacts facts = load_shared<RowFacts>(row_facts(row));
        if (facts.place[0] < 0) continue;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float m[2];
          float* at[2];
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            at[v] = columns[c][v] + facts.place[v] * step;
            m[v] = 0;  // others may write where a column that does not exist would be read
            if (exists[c][v] && is_word[c]) m[v] = load_shared<float>(at[v]) * facts.inverse[v];
          }
          use(maps, row, c, m);
          if constexpr (kReplaces)
#pragma unroll
            for (int v = 0; v < 2; ++v)
              if (exists[c][v]) store_shared(at[v], m[v] * facts.inverse[v]);
        }
      }
    });
  }

  // Leaves slopes in the place of M, each over the pieces of its row.
  EAR_OPS_DEVICE void to_slopes(const StripPair& of) const {
    for_entries<true>(of, [&](auto maps, int, int, float (&m)[2]) {
      const float both[2] = {m[0], m[1]};
      maps.slopes(both[0], both[1], m);
    });
  }

  // --- tiles of two strips ---

  // Tokens of a tile of a strip: the first and the last one of each list.
  EAR_OPS_DEVICE void range_of(Which which, int tile, OfViews* first, OfViews* last) const {
    const Strip of = strip(which);
    const int most = a.strip_tokens;
    *first = {of.from.first + most * tile, of.from.second + most * tile};
    *last = {Strip::smaller(of.to.first, first->first + most), Strip::smaller(of.to.second, first->second + most)};
  }
  EAR_OPS_DEVICE int own_tiles() const { return strip(Which::kOwn).tiles(a.strip_tokens); }

  // Makes M of the own strip and the other one, or pieces(i) M to be exact, and calls with_sums(pair of strips). Then
  // calls use(pair, P) for the own tile number `part` and the tiles of the other strip, of which the vectors of `chunk`
  // are there. There is one place that makes attention. `use` may be an int, where there is nothing to call.
  // kViews: of both views, or of one alone, which is `view` and comes in the place of the first.
  template <int kViews, typename WithSums, typename Use>
  EAR_OPS_DEVICE void visit(int part, int chunk, int view, const WithSums& with_sums, const Use& use) {
    constexpr bool kUses = !std::is_same<Use, int>::value;
    const int query_tiles = strip(kRows).tiles(a.strip_tokens), key_tiles = strip(kColumns).tiles(a.strip_tokens);
    const StripPair of{kRows, kColumns, query_tiles > 1, query_tiles > 1 || key_tiles > 1};
    const int all = query_tiles * key_tiles, of_part = of.large ? (kQueries ? key_tiles : query_tiles) : 0;
    describe_map(kRows, kColumns);
    if (of.large) store_shared(large_sums(0) + thread_index(), 0.0f);
#pragma unroll 1
    for (int step = 0; step < all + (kUses ? of_part : 0); ++step) {
      const bool sums = step < all;
      int query_tile = 0, key_tile = 0;
      if (of.large) {
        const int other = step - all;
        query_tile = sums ? step / key_tiles : kQueries ? part : other;
        key_tile = sums ? step % key_tiles : kQueries ? other : part;
      }
      WordTile tile;
      range_of(kRows, query_tile, &tile.query, &tile.query_end);
      range_of(kColumns, key_tile, &tile.key, &tile.key_end);
      float p[2][kOwned / 8][4];
      attention(tile, sums && of.large ? chunks - 1 : chunk, p);
      if (sums) {
#pragma unroll
        for (int v = 0; v < 2; ++v) store(v, p[v]);
      }
      if constexpr (kViews == 1)
#pragma unroll
        for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) p[0][n][e] = view == 0 ? p[0][n][e] : p[1][n][e];
      if (sums) {
        sync_block();
        sum_keys();
        sync_block();
        sum_queries();
        sync_block();
        if (of.large) add_to_large(of);
        if (of.large) sync_block();
        if (step == all - 1) {
          with_sums(of);
          if (kUses) sync_block();
        }
      }
      if constexpr (kUses)
        if (!sums || !of.large) use(of, p);
    }
  }
};

// Where a block of threads works that takes strips of the queries of a head.
struct WordHead {
  int blocks, block, head;
  int64_t pair;

  EAR_OPS_DEVICE explicit WordHead(const WordArgs& a) : blocks((a.queries + kOwned - 1) / kOwned) {
    const int index = static_cast<int>(block_index());
    block = index % blocks;
    head = index / blocks % a.heads;
    pair = index / blocks / a.heads;
  }
};

}  // namespace ear_ops::cuda
