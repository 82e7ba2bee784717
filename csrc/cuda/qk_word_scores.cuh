// Token attention of a tile of both views, in registers, from tokens in shared memory (qk_word_tokens.cuh).
#pragma once

#include "qk_word_tokens.cuh"

namespace ear_ops::cuda {

struct alignas(8) TwoFloats {
  float first, second;
};
struct alignas(16) FourFloats {
  float numbers[4];
};

// A block of threads, at work on one pair and head. kOwner: whose tokens are the rows of scores in registers.
// kKnown: how many statistics of queries there are when attention is made.
template <typename T, int kD, Role kOwner, int kKnown>
struct WordScores : WordTokens<T, kD> {
  using Tokens = WordTokens<T, kD>;
  using Tokens::a, Tokens::lists, Tokens::head, Tokens::chunks, Tokens::Tokens;
  using Tokens::vectors, Tokens::facts, Tokens::head_of, Tokens::stats, Tokens::tile;
  static constexpr bool kQueries = kOwner == Role::kQueries;
  static constexpr Role kVisitor = kQueries ? Role::kKeys : Role::kQueries;
  // Visited tokens that are multiplied at a time: registers do not hold the products of more floats, which are split.
  static constexpr int kAtOnce = Products<T>::kSplit ? 32 : kOwned;

  // Whether tiles have rows for the eight queries of a score or probability that this lane holds, and where it lies.
  EAR_OPS_DEVICE bool in_tile(int n) const { return (kQueries ? warp_index() * 16 : n * 8) < a.strip_tokens; }
  EAR_OPS_DEVICE float* tile_of_lane(int v, int n, int e) const {
    const int owned = owned_of_lane(e / 2), visited = n * 8 + visited_of_lane(e);
    return kQueries ? tile(v, owned, visited) : tile(v, visited, owned);
  }

  // Whether positions or a bias decide which scores are compared.
  EAR_OPS_DEVICE bool is_general() const { return a.is_causal || a.window || a.bias[0].data; }

  // Which keys of a tile exist, a bit each.
  EAR_OPS_DEVICE void existing_keys(int v, uint32_t (&bits)[2]) const {
#pragma unroll
    for (int w = 0; w < 2; ++w) bits[w] = ballot(head_of(Role::kKeys, v, w * kWarp + thread_index() % kWarp) >= 0);
  }

  // Puts a number in the place of those of visited keys that do not exist.
  EAR_OPS_DEVICE void replace_missing(const uint32_t (&exist)[2], float by, float (&numbers)[kOwned / 8][4]) const {
    if ((exist[0] & exist[1]) == ~0u) return;
#pragma unroll
    for (int n = 0; n < kOwned / 8; ++n) {
      const uint32_t mine = exist[n / 4] >> (n % 4 * 8 + visited_of_lane(0));
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (!(mine >> e % 2 & 1)) numbers[n][e] = by;
    }
  }

  // Turns products of queries and visited keys into scores in units of log 2. A key that does not exist, or that
  // positions or a bias forbid, gets -infinity. Queries that are not compared keep numbers without a meaning. Returns
  // which of the lane's queries compare something: bit 2 view + half.
  EAR_OPS_DEVICE uint32_t finish(float (&scores)[2][kOwned / 8][4]) const {
    if (is_general()) return finish_each(scores);
    const float factor = a.scale * kLog2E;
    uint32_t compared = 0;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
#pragma unroll
      for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[v][n][e] *= factor;
      uint32_t exist[2];
      existing_keys(v, exist);
      if (exist[0] | exist[1]) compared |= 3u << (2 * v);
      replace_missing(exist, -infinity(), scores[v]);
    }
    return compared;
  }

  // The same under a bias, or where positions forbid a part. Scores go through shared memory, each to its own lane, so
  // that what is asked of them is code for one score.
  EAR_OPS_DEVICE uint32_t finish_each(float (&scores)[2][kOwned / 8][4]) const {
    const Structure structure(a);
#pragma unroll
    for (int v = 0; v < 2; ++v) store(v, scores[v]);
    uint32_t compared = 0;
#pragma unroll 1
    for (int i = 0; i < kOwned; ++i) {
      const int v = i / (kOwned / 2), n = i / 4 % (kOwned / 8), e = i % 4;
      if (!in_tile(n)) continue;
      float* const at = tile_of_lane(v, n, e);
      const int owned = owned_of_lane(e / 2), visited = n * 8 + visited_of_lane(e);
      const TokenFacts query = load_shared<TokenFacts>(facts(Role::kQueries, v, kQueries ? owned : visited));
      const TokenFacts key = load_shared<TokenFacts>(facts(Role::kKeys, v, kQueries ? visited : owned));
      bool allowed = query.head >= 0 && key.head >= 0 && structure.allows(query.position, key.position);
      float score = load_shared<float>(at);
      if (allowed && a.bias[v].data) {
        const Strides& s = a.bias[v].strides;
        const float added = load_global(a.bias[v].data + lists.pair * s.batch + head * s.head + query.position * s.row +
                                        key.position * s.column);
        allowed = added != -infinity();
        score = in_log2(score * a.scale + added);
      } else {
        score *= a.scale * kLog2E;
      }
      if (allowed) compared |= 1u << (2 * v + e / 2);
      store_shared(at, allowed ? score : -infinity());
    }
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          scores[v][n][e] = in_tile(n) ? load_shared<float>(tile_of_lane(v, n, e)) : -infinity();
    return compared;
  }

  // Products of the queries and keys of a tile. The vectors of `chunk` stay.
  template <int kKnownNow>
  EAR_OPS_DEVICE void multiply(const WordTile& at, int chunk, float (&products)[2][kOwned / 8][4]) {
    clear(products);
#pragma unroll 1
    for (int c = 0; c <= chunks; ++c) {
      if (c == chunks && chunk == chunks - 1) break;  // they are there
      this->template bring<kKnownNow>(at, c < chunks ? c : chunk);
      if (c == chunks) break;
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const char* owned = vectors(kOwner, v) + SharedVectors<T, kD>::bytes(16) * warp_index();
#pragma unroll
        for (int k = 0; k < kOwned; k += kAtOnce) {
          float some[kAtOnce / 8][4];
#pragma unroll
          for (int n = 0; n < kAtOnce / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) some[n][e] = products[v][k / 8 + n][e];
          Products<T>::template add_scores<kD, kAtOnce, !kQueries>(
              owned, vectors(kVisitor, v) + SharedVectors<T, kD>::bytes(k), some);
#pragma unroll
          for (int n = 0; n < kAtOnce / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) products[v][k / 8 + n][e] = some[n][e];
        }
      }
    }
  }

  // A statistic of the query of a score that this lane holds.
  struct Statistic {
    float of_half[2], of_eight[kOwned / 8][2];

    EAR_OPS_DEVICE explicit Statistic(const float* of_queries) {
      if constexpr (kQueries) {
#pragma unroll
        for (int half = 0; half < 2; ++half) of_half[half] = load_shared<float>(of_queries + owned_of_lane(half));
      } else {
#pragma unroll
        for (int n = 0; n < kOwned / 8; ++n) {
          const TwoFloats two = load_shared<TwoFloats>(of_queries + n * 8 + visited_of_lane(0));
          of_eight[n][0] = two.first, of_eight[n][1] = two.second;
        }
      }
    }
    EAR_OPS_DEVICE float operator()(int n, int e) const { return kQueries ? of_half[e / 2] : of_eight[n][e % 2]; }
  };

  // Token attention of a tile; 0 where a query has no row in M, or may not attend to a key. Owned keys that do not
  // exist keep numbers without a meaning.
  EAR_OPS_DEVICE void attention(const WordTile& at, int chunk, float (&p)[2][kOwned / 8][4]) {
    multiply<kKnown>(at, chunk, p);
    const bool general = is_general();
    if (general) finish_each(p);
    const float factor = general ? 1.0f : a.scale * kLog2E;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const Statistic maximum(stats(v, 0)), inverse(stats(v, 1));
#pragma unroll
      for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) p[v][n][e] = product(exp2_fast(p[v][n][e] * factor - maximum(n, e)), inverse(n, e));
      if constexpr (kQueries) {
        uint32_t exist[2];
        existing_keys(v, exist);
        replace_missing(exist, 0, p[v]);
      }
      sync_warp();  // the statistics of both views at a time would need more registers than there are
    }
  }

  // Puts P of a tile into shared memory.
  EAR_OPS_DEVICE void store(int v, const float (&p)[kOwned / 8][4]) const {
#pragma unroll
    for (int n = 0; n < kOwned / 8; ++n)
      if constexpr (kQueries) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (in_tile(n)) store_shared(tile_of_lane(v, n, 2 * half), TwoFloats{p[n][2 * half], p[n][2 * half + 1]});
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (in_tile(n)) store_shared(tile_of_lane(v, n, e), p[n][e]);
      }
  }
};

}  // namespace ear_ops::cuda
