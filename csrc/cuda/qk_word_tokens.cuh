// Tokens of both views in the order of their words, and how 64 queries and 64 keys of each come into shared memory.
//
//   global memory   lists of tokens (qk_words_args.h); Q and K; row_stats and d of queries
//                     | cp.async, vector by vector
//   shared memory   64 queries and 64 keys of each view, and of each its position, its word and its statistics
#pragma once

#include "qk_scores.cuh"
#include "qk_words_args.h"

namespace ear_ops::cuda {

constexpr int kWarps = kThreads / kWarp;
constexpr int kKnownStats = 3;  // of a query: maximum, 1 / sum of exponentials, d

// Where a block's data lie in shared memory.
template <typename T, int kD>
struct WordMemory {
  static constexpr int kVectors = SharedVectors<T, kD>::bytes(kOwned);  // of one role and view
  static constexpr int kTile = 4 * kVectors;                            // P [64, 64 + 1]
  static constexpr int kTileRow = kOwned + 1;
  static constexpr int kMaps = kTile + kOwned * kTileRow * 4;  // [2, 32, 32 + 1]
  static constexpr int kMapsRow = kStripWords + 1;
  static constexpr int kPositions = kMaps + 2 * kStripWords * kMapsRow * 4;  // [roles, views, 64], positions of tokens
  static constexpr int kWords = kPositions + 4 * kOwned * 4;                 // likewise, their words within the strip
  static constexpr int kStats = kWords + 4 * kOwned * 4;                     // [3, views, 64] of queries
  static constexpr int kBytes = kStats + 2 * kKnownStats * kOwned * 4;
};

// 64 tokens of each role, of one view: those of its list from `query` and from `key` on, before the ends.
struct WordTile {
  int query, query_end, key, key_end;
};

// A number of each view. Registers have no index, so that an array would lie in memory.
struct OfViews {
  int first, second;
  EAR_OPS_DEVICE int operator()(int v) const { return v == 0 ? first : second; }
  EAR_OPS_DEVICE void set(int v, int to) {
    if (v == 0) {
      first = to;
    } else {
      second = to;
    }
  }
};

// The tokens of one pair and head: where they are, and those in shared memory.
template <typename T, int kD>
struct WordTokens {
  using Memory = WordMemory<T, kD>;
  static constexpr int kNone = -1;

  const WordArgs& a;
  int64_t pair;
  int head;
  int known;  // statistics of queries that exist by now, of kKnownStats
  int chunks;
  OfViews loaded_queries{kNone, kNone}, loaded_keys{kNone, kNone};  // from where in the lists on

  EAR_OPS_DEVICE WordTokens(const WordArgs& a, int64_t pair, int head, int known)
      : a(a), pair(pair), head(head), known(known), chunks((a.dim + kD - 1) / kD) {}

  // --- words and tokens ---

  // Where in the list of a view a number begins.
  EAR_OPS_DEVICE int begin(int v, int number) const {
    const int at = number < a.numbers ? number : a.numbers;
    return load_global(a.first + (v * a.pairs + pair) * (a.numbers + 1) + at);
  }
  EAR_OPS_DEVICE int pieces(int v, int number) const { return begin(v, number + 1) - begin(v, number); }
  // Whether a number is a word of both views, which has a row in M.
  EAR_OPS_DEVICE bool has_row(int number) const { return number > 0 && pieces(0, number) > 0 && pieces(1, number) > 0; }

  // Where the queries and the keys of a strip begin; queries without a word are not compared, keys are attended to.
  EAR_OPS_DEVICE int first_query(int v, int strip) const { return begin(v, strip == 0 ? 1 : strip * kStripWords); }
  EAR_OPS_DEVICE int first_key(int v, int strip) const { return begin(v, strip * kStripWords); }
  EAR_OPS_DEVICE int end(int v, int strip) const { return begin(v, (strip + 1) * kStripWords); }
  EAR_OPS_DEVICE bool has_queries(int strip) const {
    return first_query(0, strip) < end(0, strip) && first_query(1, strip) < end(1, strip);
  }
  EAR_OPS_DEVICE bool has_keys(int strip) const {
    return first_key(0, strip) < end(0, strip) || first_key(1, strip) < end(1, strip);
  }
  EAR_OPS_DEVICE int64_t place(int v, int index) const { return (v * a.pairs + pair) * a.queries + index; }
  EAR_OPS_DEVICE int position(int v, int index) const { return load_global(a.position + place(v, index)); }
  EAR_OPS_DEVICE int number(int v, int index) const { return load_global(a.number + place(v, index)); }

  // --- shared memory ---

  EAR_OPS_DEVICE char* vectors(Role role, int v) const {
    return shared_memory() + (role == Role::kQueries ? v : 2 + v) * Memory::kVectors;
  }
  EAR_OPS_DEVICE int* fact(int table, Role role, int v, int token) const {
    return reinterpret_cast<int*>(shared_memory() + table) + ((role == Role::kQueries ? v : 2 + v) * kOwned + token);
  }
  EAR_OPS_DEVICE int position_of(Role role, int v, int token) const {
    return load_shared<int>(fact(Memory::kPositions, role, v, token));
  }
  // Of a token, the number of its word within the strip; -1 where the token does not exist, or is a query without a
  // row.
  EAR_OPS_DEVICE int word_of(Role role, int v, int token) const {
    return load_shared<int>(fact(Memory::kWords, role, v, token));
  }
  EAR_OPS_DEVICE float* stat_address(int k, int v, int query) const {
    return reinterpret_cast<float*>(shared_memory() + Memory::kStats) + (2 * k + v) * kOwned + query;
  }
  EAR_OPS_DEVICE float stat(int k, int v, int query) const { return load_shared<float>(stat_address(k, v, query)); }
  EAR_OPS_DEVICE float* tile(int query, int key) const {
    return reinterpret_cast<float*>(shared_memory() + Memory::kTile) + query * Memory::kTileRow + key;
  }
  // M of word i of one strip and word j of another, or its slope.
  EAR_OPS_DEVICE float* map(int v, int i, int j) const {
    return reinterpret_cast<float*>(shared_memory() + Memory::kMaps) + (v * kStripWords + i) * Memory::kMapsRow + j;
  }

  EAR_OPS_DEVICE void forget() { loaded_queries = loaded_keys = OfViews{kNone, kNone}; }

  // Writes down what is known of the tokens [first, last) of a list, at most 64.
  EAR_OPS_DEVICE void describe(Role role, int v, int first, int last) const {
    const int token = thread_index();
    if (token >= kOwned) return;
    int at = 0, word = -1;
    if (first + token < last) {
      at = position(v, first + token);
      const int of_token = number(v, first + token);
      if (role == Role::kKeys || has_row(of_token)) word = of_token % kStripWords;
    }
    store_shared(fact(Memory::kPositions, role, v, token), at);
    store_shared(fact(Memory::kWords, role, v, token), word);
    if (role == Role::kKeys) return;
    const int64_t index = stats_index(a, pair, head, at), step = stats_step(a);
    for (int k = 0; k < known; ++k) {
      const float* from = k < 2 ? a.row_stats + (2 * k + v) * step : a.d + v * step;
      store_shared(stat_address(k, v, token), word < 0 ? 0.0f : load_global(from + index));
    }
  }

  // Copies the features [feature, feature + kD) of the tokens that were described, and zeros for all others.
  EAR_OPS_DEVICE void gather(Role role, int v, int feature) const {
    using Layout = SharedVectors<T, kD>;
    constexpr int kElements = 16 / sizeof(T), kAccesses = kD / kElements;
    const HeadsPointer& of = role == Role::kQueries ? a.query[v] : a.key[v];
    const int64_t of_head = role == Role::kQueries ? head : head / (a.heads / a.key_heads);
    const T* from = static_cast<const T*>(of.data) + pair * of.strides.batch + of_head * of.strides.head;
    char* to = vectors(role, v);
#pragma unroll 1
    for (int i = thread_index(); i < kOwned * (a.vectorized ? kAccesses : kD); i += kThreads) {
      const int token = a.vectorized ? i / kAccesses : i / kD;
      const int c = a.vectorized ? i % kAccesses * kElements : i % kD;
      const bool real = word_of(role, v, token) >= 0 && feature + c < a.dim;
      const T* at =
          real ? from + position_of(role, v, token) * of.strides.row + (feature + c) * of.strides.column : from;
      if (a.vectorized) {
        copy_async<16>(to + Layout::offset(token, c), at, real);
      } else {
        store_shared(to + Layout::offset(token, c), real ? load_global(at) : T{});
      }
    }
  }

  // Brings the vectors of a tile of view v, where they are not there yet.
  EAR_OPS_DEVICE void bring(int v, const WordTile& tile, int chunk) {
    const bool missing[2] = {chunks > 1 || loaded_queries(v) != tile.query, chunks > 1 || loaded_keys(v) != tile.key};
    if (!missing[0] && !missing[1]) return;
    loaded_queries.set(v, tile.query), loaded_keys.set(v, tile.key);
    sync_block();  // what lies there may still be read
    if (missing[0]) describe(Role::kQueries, v, tile.query, tile.query_end);
    if (missing[1]) describe(Role::kKeys, v, tile.key, tile.key_end);
    sync_block();
#pragma unroll 1
    for (int k = 0; k < 2; ++k)
      if (k == 0 ? missing[0] : missing[1]) gather(k == 0 ? Role::kQueries : Role::kKeys, v, chunk * kD);
    commit_copies();
    wait_copies<0>();
    sync_block();
    if constexpr (Products<T>::kSplit) {
#pragma unroll 1
      for (int k = 0; k < 2; ++k)
        if (k == 0 ? missing[0] : missing[1])
          Products<T>::template split<kD, kOwned, kWarps>(vectors(k == 0 ? Role::kQueries : Role::kKeys, v));
      sync_block();
    }
  }
};

}  // namespace ear_ops::cuda
