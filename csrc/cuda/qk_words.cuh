// Attention between words: tiles of token attention, and their sums over words. For each pair and head,
//
//   M[i, j] = sum over the pieces q of i and k of j of P[q, k] / pieces(i)
//
// is made of both views for a strip of 32 words i and another one of 32 words j at a time. M is compared entry by
// entry, so that nothing of its size ever exists.
//
//   shared memory   64 queries and 64 keys of each view (qk_word_tokens.cuh)
//                     | mma
//   registers       scores of one view, 64 x 64 --> P
//   shared memory   P of one tile
//                     | a warp sums up 8 words i, a lane of it one word j, always in the same order
//   shared memory   M of 32 x 32 words, both views --> values, or slopes dv/dM / pieces(i) in its place
//
// What the products cost: a strip takes the tokens of its words 64 at a time, however few it has. Where it has at most
// 64 in each view, as at 2 pieces a word, the forward makes every score twice (for the softmax, and for M). The
// backward makes it eight times: twice for d, and three times each for the queries and the keys, whose blocks need M of
// both views and own the tokens of one. A block of threads that owns more than 64 tokens makes M once for each 64.
// Tiles that a causal mask or a window hides are made nevertheless. Head dimensions beyond kD come in chunks of kD
// features, as in qk_scores.cuh; a block makes all of this for the gradient of one chunk.
#pragma once

#include "qk_word_maps.cuh"
#include "qk_word_tokens.cuh"

namespace ear_ops::cuda {

constexpr int kWordsOfWarp = kStripWords / kWarps;  // words i of a strip that a warp sums up

// A block of threads, at work on one pair and head. kOwner: whose tokens are the rows of scores in registers.
template <typename T, int kD, Role kOwner>
struct WordBlock : WordTokens<T, kD> {
  using Tokens = WordTokens<T, kD>;
  using Tokens::a, Tokens::pair, Tokens::head, Tokens::chunks;
  using Tokens::begin, Tokens::pieces, Tokens::has_row, Tokens::first_query, Tokens::first_key, Tokens::end;
  using Tokens::Tokens;
  using Tokens::vectors, Tokens::position_of, Tokens::word_of, Tokens::stat, Tokens::tile, Tokens::map, Tokens::bring;
  static constexpr bool kQueries = kOwner == Role::kQueries;
  // Visited tokens that are multiplied at a time: registers do not hold the products of more floats, which are split.
  static constexpr int kAtOnce = Products<T>::kSplit ? 32 : kOwned;

  // --- scores and probabilities of a tile ---

  // Turns products of queries and keys into scores in units of log 2. Where the two are not compared, the score becomes
  // -infinity. Returns where they are: bit 4 n + e.
  EAR_OPS_DEVICE uint32_t finish(int v, float (&scores)[kOwned / 8][4]) const {
    constexpr Role kOther = kQueries ? Role::kKeys : Role::kQueries;
    const float factor = a.scale * kLog2E;
    const int words[2] = {word_of(kOwner, v, owned_of_lane(0)), word_of(kOwner, v, owned_of_lane(1))};
    uint32_t compared = 0;
#pragma unroll
    for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int word = word_of(kOther, v, n * 8 + visited_of_lane(odd));
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (word >= 0 && words[half] >= 0) compared |= 1u << (4 * n + 2 * half + odd);
      }
    const bool general = a.is_causal || a.window || a.bias[0].data;
    if (general) return finish_each(v, compared, scores);
#pragma unroll
    for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[n][e] = compared >> (4 * n + e) & 1 ? scores[n][e] * factor : -infinity();
    return compared;
  }

  // The same under a bias, or where positions forbid a part. Scores go through shared memory, each to its own lane, so
  // that what is asked of them is code for one score.
  EAR_OPS_DEVICE uint32_t finish_each(int v, uint32_t compared, float (&scores)[kOwned / 8][4]) const {
    const Structure structure(a);
#pragma unroll
    for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) store_shared(tile_of_lane(n, e), scores[n][e]);
#pragma unroll 1
    for (int i = 0; i < kOwned / 2; ++i) {
      const int owned = owned_of_lane(i % 4 / 2), visited = i / 4 * 8 + visited_of_lane(i);
      const int query = position_of(Role::kQueries, v, kQueries ? owned : visited);
      const int key = position_of(Role::kKeys, v, kQueries ? visited : owned);
      float* at = tile_of_lane(i / 4, i % 4);
      bool allowed = (compared >> i & 1) && structure.allows(query, key);
      float score = load_shared<float>(at);
      if (allowed && a.bias[v].data) {
        const Strides& s = a.bias[v].strides;
        const float added =
            load_global(a.bias[v].data + pair * s.batch + head * s.head + query * s.row + key * s.column);
        allowed = added != -infinity();
        score = in_log2(score * a.scale + added);
      } else {
        score *= a.scale * kLog2E;
      }
      if (!allowed) compared &= ~(1u << i);
      store_shared(at, allowed ? score : -infinity());
    }
#pragma unroll
    for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[n][e] = load_shared<float>(tile_of_lane(n, e));
    return compared;
  }

  // Where the scores and probabilities of a tile lie that this lane holds.
  EAR_OPS_DEVICE float* tile_of_lane(int n, int e) const {
    const int owned = owned_of_lane(e / 2), visited = n * 8 + visited_of_lane(e);
    return kQueries ? tile(owned, visited) : tile(visited, owned);
  }

  // Scores of a tile of view v, as `finish` leaves them. The vectors of `chunk` stay.
  EAR_OPS_DEVICE uint32_t score(int v, const WordTile& tile, int chunk, float (&scores)[kOwned / 8][4]) {
    float products[kOwned / kAtOnce][kAtOnce / 8][4];
    clear(products);
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      bring(v, tile, c);
      const char* owned = vectors(kOwner, v) + SharedVectors<T, kD>::bytes(16) * warp_index();
      const char* visited = vectors(kQueries ? Role::kKeys : Role::kQueries, v);
#pragma unroll
      for (int k = 0; k < kOwned / kAtOnce; ++k)
        Products<T>::template add_scores<kD, kAtOnce, !kQueries>(
            owned, visited + SharedVectors<T, kD>::bytes(k * kAtOnce), products[k]);
    }
    if (chunk != chunks - 1) bring(v, tile, chunk);
#pragma unroll
    for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[n][e] = products[n / (kAtOnce / 8)][n % (kAtOnce / 8)][e];
    return finish(v, scores);
  }

  // Token attention of a tile; 0 where a query and a key are not compared.
  EAR_OPS_DEVICE uint32_t attention(int v, const WordTile& tile, int chunk, float (&p)[kOwned / 8][4]) {
    const uint32_t compared = score(v, tile, chunk, p);
#pragma unroll
    for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int query = kQueries ? owned_of_lane(e / 2) : n * 8 + visited_of_lane(e);
        const float exponent = exponential(p[n][e], stat(0, v, query));
        p[n][e] = compared >> (4 * n + e) & 1 ? product(exponent, stat(1, v, query)) : 0.0f;
      }
    return compared;
  }

  // --- maps ---

  // The n-th word of strip i that this warp sums up.
  EAR_OPS_DEVICE int row_of_warp(int i, int n) const { return i * kStripWords + warp_index() + kWarps * n; }

  // Adds the attention in the tile to M of the words of strip i, for this lane's word of strip j.
  EAR_OPS_DEVICE void add_words(int v, int i, int j, const WordTile& at) const {
    const auto within = [](int index, int first) {
      const int place = index - first;
      return place < 0 ? 0 : place > kOwned ? kOwned : place;
    };
    const int lane = thread_index() % kWarp, column = j * kStripWords + lane;
    const int keys = within(begin(v, column), at.key), end_keys = column > 0 ? within(begin(v, column + 1), at.key) : 0;
#pragma unroll 1
    for (int n = 0; n < kWordsOfWarp; ++n) {
      const int row = row_of_warp(i, n);
      const int end_queries = row > 0 ? within(begin(v, row + 1), at.query) : 0;
      float* const to = map(v, row % kStripWords, lane);
      float sum = load_shared<float>(to);
#pragma unroll 1
      for (int query = within(begin(v, row), at.query); query < end_queries; ++query) {
        float of_query = 0;
#pragma unroll 1
        for (int key = keys; key < end_keys; ++key) of_query += load_shared<float>(tile(query, key));
        sum += of_query;
      }
      store_shared(to, sum);
    }
  }

  // Visits tiles of tokens in 2 + kViews turns, so that there is one place that makes attention.
  //
  // In the first two turns, makes sums of P over the words of strip i and strip j in both views: M times the pieces of
  // i. Every thread makes some of its own, and sees no others without a barrier. What a view lacks is 0. After that
  // come kViews views, `own_view` first. For each, leaves slopes in the place of M, and calls use(view, compared, P)
  // for the tiles of range(view), of which the vectors of `chunk` are there.
  template <int kViews, typename Range, typename Use>
  EAR_OPS_DEVICE void visit(int i, int j, int own_view, const Range& range, int chunk, const Use& use) {
    sync_block();  // what was there before may still be read
#pragma unroll 1
    for (int turn = 0; turn < 2 + kViews; ++turn) {
      const bool sums = kViews == 0 || turn < 2;
      const int of_turn = sums ? turn : own_view + turn - 2;
      WordTile all{first_query(of_turn, i), end(of_turn, i), first_key(of_turn, j), end(of_turn, j)};
      if constexpr (kViews > 0) {
        if (turn == 2) to_slopes(i);
        if (!sums) all = range(of_turn);
      }
      if (sums)
#pragma unroll 1
        for (int n = 0; n < kWordsOfWarp; ++n)
          store_shared(map(of_turn, row_of_warp(i, n) % kStripWords, thread_index() % kWarp), 0.0f);
      const int with_word = begin(of_turn, 1);
#pragma unroll 1
      for (int query = all.query; query < all.query_end; query += kOwned)
#pragma unroll 1
        for (int key = all.key; key < all.key_end; key += kOwned) {
          if (sums && key + kOwned <= with_word) continue;  // no word is there
          const int v = unknown(of_turn);
          const WordTile at{query, all.query_end, key, all.key_end};
          float p[kOwned / 8][4];
          const uint32_t compared = attention(v, at, sums ? chunks - 1 : chunk, p);
          if constexpr (kViews > 0)
            if (!sums) {
              use(v, compared, p);
              continue;
            }
#pragma unroll
          for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) store_shared(tile_of_lane(n, e), p[n][e]);
          sync_block();
          add_words(v, i, j, at);
          sync_block();
        }
    }
  }

  // Calls use(maps, n, M of both views, whether the row counts, the pieces of its word) for the entries of this thread,
  // after the sums are made, with the type of the comparison.
  template <typename Use>
  EAR_OPS_DEVICE void for_entries(int i, const Use& use) const {
    with_maps(a.comparison, [&](auto maps) {
#pragma unroll 1
      for (int n = 0; n < kWordsOfWarp; ++n) {
        const int row = row_of_warp(i, n);
        const float pieces_of[2] = {static_cast<float>(pieces(0, row)), static_cast<float>(pieces(1, row))};
        float m[2] = {0, 0};
        const bool counts = has_row(row);
        if (counts)
#pragma unroll
          for (int v = 0; v < 2; ++v)
            m[v] = load_shared<float>(map(v, row % kStripWords, thread_index() % kWarp)) / pieces_of[v];
        use(maps, n, m, counts, pieces_of);
      }
    });
  }

  // Leaves slopes in the place of M, each over the pieces of its word of strip i.
  EAR_OPS_DEVICE void to_slopes(int i) const {
    for_entries(i, [&](auto maps, int n, const float (&m)[2], bool counts, const float (&pieces_of)[2]) {
      float slopes[2] = {0, 0};
      maps.slopes(m[0], m[1], slopes);
#pragma unroll
      for (int v = 0; v < 2; ++v)
        store_shared(map(v, row_of_warp(i, n) % kStripWords, thread_index() % kWarp),
                     counts ? slopes[v] / pieces_of[v] : 0.0f);
    });
    sync_block();
  }
};

// Where a block of threads works that owns a strip of words i.
struct WordStrip {
  int strips, strip, head;
  int64_t pair;

  EAR_OPS_DEVICE explicit WordStrip(const WordArgs& a) : strips((a.numbers + kStripWords - 1) / kStripWords) {
    const int block = static_cast<int>(block_index());
    strip = block % strips;
    head = block / strips % a.heads;
    pair = block / strips / a.heads;
  }
};

}  // namespace ear_ops::cuda
