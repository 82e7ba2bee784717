// Tokens of both views in the order of their words, and how a tile of queries and of keys of each comes into shared
// memory.
//
//   global memory   lists of tokens (qk_words_args.h); Q and K; row_stats and d of queries
//                     | cp.async, vector by vector
//   shared memory   64 queries and 64 keys of each view, and of each its position, its head and its statistics
//
// The head of a token is the place within the tile of the first token of its word. M and its slopes lie at heads.
#pragma once

#include "qk_scores.cuh"
#include "qk_word_strips.cuh"

namespace ear_ops::cuda {

constexpr int kWarps = kThreads / kWarp;
constexpr int kWordStats = 3;  // of a query: maximum, 1 / sum of exponentials, d
constexpr int kNoHead = -1;    // of a token that does not exist, or of a query without a row in M

struct alignas(8) TokenFacts {
  int position, head;
};
// Of a row of M: the place of its word in each view, and 1 over its pieces. kNoHead: it does not count.
struct alignas(16) RowFacts {
  int place[2];
  float inverse[2];
};
// Of a column of M: the place of its word in each view, or kNoHead.
struct alignas(8) ColumnFacts {
  int place[2];
};

// The index of a thread, of which the compiler keeps nothing that follows from it in registers.
EAR_OPS_DEVICE int thread_anew() { return unknown(thread_index()); }

// Where a block's data lie in shared memory. Rows of tiles come last, so that a launch may ask for fewer of them.
template <typename T, int kD>
struct WordMemory {
  static constexpr int kVectors = SharedVectors<T, kD>::bytes(kOwned);  // of one role and view
  static constexpr int kTokens = 4 * kVectors;                          // [roles, views, 64] facts of tokens
  static constexpr int kStats = kTokens + 4 * kOwned * 8;               // [views, 3, 64] of queries
  static constexpr int kSums = kStats + 2 * kWordStats * kOwned * 4;    // [views, 64], of large strips
  static constexpr int kStrips = kSums + 2 * kOwned * 4;                // two of them
  static constexpr int kLoaded = kStrips + 2 * static_cast<int>(sizeof(Strip));
  static constexpr int kShare = kLoaded + 16;
  static constexpr int kTiles = kShare + 16;
  // A row: of each view, P of one query and 64 keys, and 16 bytes. In those of the first view lie the facts of a row of
  // M; in those of the second view the facts of a column, the value of a row and whether it has a target.
  static constexpr int kOfView = kOwned + 4, kTileRow = 2 * kOfView;
  static constexpr int kBlocks = sizeof(T) == 4 ? 2 : 3;  // that a multiprocessor shall hold where it has no gradients
  static EAR_OPS_CONSTANT int64_t bytes(int rows) { return kTiles + int64_t(rows) * kTileRow * 4; }
};

// A tile of both views: tokens of each list from `query` and from `key` on, before the ends.
struct WordTile {
  OfViews query, query_end, key, key_end;
};

struct alignas(16) Loaded {
  OfViews queries, keys;
};

// The strip whose words a block of threads owns at the moment, and the one that it visits.
enum class Which { kOwn, kOther };

// The tokens of one pair and head: where they are, and those in shared memory.
template <typename T, int kD>
struct WordTokens {
  using Memory = WordMemory<T, kD>;

  const WordArgs& a;
  WordLists lists;
  int head, key_head;
  int chunks;

  EAR_OPS_DEVICE WordTokens(const WordArgs& a, int64_t pair, int head)
      : a(a),
        lists{a, static_cast<int>(pair)},
        head(head),
        key_head(head / (a.heads / a.key_heads)),
        chunks((a.dim + kD - 1) / kD) {
    forget();
  }

  // --- strips, which lie in shared memory because registers are few ---

  EAR_OPS_DEVICE Strip* strip_address(Which which) const {
    return reinterpret_cast<Strip*>(shared_memory() + Memory::kStrips) + (which == Which::kOwn ? 0 : 1);
  }
  EAR_OPS_DEVICE Strip strip(Which which) const { return load_shared<Strip>(strip_address(which)); }

  // Calls use() for every strip of the pair, when it is in its place. Ends with a barrier.
  template <typename Use>
  EAR_OPS_DEVICE void for_strips(Which which, const Use& use) const {
    OfViews from = lists.begins(0);
#pragma unroll 1
    while (true) {
      sync_block();  // the strip before may still be read
      if (thread_index() == 0) store_shared(strip_address(which), Strip(lists, from));
      sync_block();
      if (!strip(which).exists(a)) break;
      use();
      from = strip(which).to;
    }
  }
  // Calls use() for the strips that block number `block` of `blocks` owns: every so many.
  template <typename Use>
  EAR_OPS_DEVICE void for_own_strips(int block, int blocks, const Use& use) const {
    int until = block;
    for_strips(Which::kOwn, [&] {
      if (until == 0) use();
      until = until == 0 ? blocks - 1 : until - 1;
    });
  }

  // --- vectors and facts ---

  // The share of a head in the upstream gradient, which is read much later.
  EAR_OPS_DEVICE char* share() const { return shared_memory() + Memory::kShare; }

  EAR_OPS_DEVICE char* vectors(Role role, int v) const {
    return shared_memory() + (role == Role::kQueries ? v : 2 + v) * Memory::kVectors;
  }
  EAR_OPS_DEVICE char* facts(Role role, int v, int token) const {
    return shared_memory() + Memory::kTokens + ((role == Role::kQueries ? v : 2 + v) * kOwned + token) * 8;
  }
  EAR_OPS_DEVICE int head_of(Role role, int v, int token) const { return load_shared<int>(facts(role, v, token) + 4); }
  EAR_OPS_DEVICE float* stats(int v, int k) const {
    return reinterpret_cast<float*>(shared_memory() + Memory::kStats) + (v * kWordStats + k) * kOwned;
  }
  // P of a query and a key.
  EAR_OPS_DEVICE float* tile(int v, int query, int key) const {
    return reinterpret_cast<float*>(shared_memory() + Memory::kTiles) + query * Memory::kTileRow + v * Memory::kOfView +
           key;
  }
  EAR_OPS_DEVICE float* row_facts(int row) const { return tile(0, row, kOwned); }
  EAR_OPS_DEVICE float* column_facts(int column) const { return tile(1, column, kOwned); }
  EAR_OPS_DEVICE float* row_value(int row) const { return tile(1, row, kOwned + 2); }
  EAR_OPS_DEVICE float* row_target(int row) const { return tile(1, row, kOwned + 3); }
  // Sums of P over words, of tiles of which one role has a single word. Its heads are 0, so that two heads make a
  // place.
  EAR_OPS_DEVICE float* large_sums(int v) const {
    return reinterpret_cast<float*>(shared_memory() + Memory::kSums) + v * kOwned;
  }

  // From where in the lists on the tokens are that are in shared memory, and that none are.
  EAR_OPS_DEVICE char* loaded() const { return shared_memory() + Memory::kLoaded; }
  EAR_OPS_DEVICE void forget() const {
    sync_block();  // somebody may still ask
    if (thread_index() == 0) store_shared(loaded(), Loaded{{-1, -1}, {-1, -1}});
    sync_block();
  }

  // Writes down what is known of the tokens [first, last) of each list, at most 64. A thread takes one. kKnown: of the
  // statistics of queries, those that exist by now.
  template <int kKnown>
  EAR_OPS_DEVICE void describe(Role role, const OfViews& first, const OfViews& last) const {
    const int thread = thread_anew(), v = thread / kOwned, token = thread % kOwned, index = first(v) + token;
    TokenFacts of{0, kNoHead};
    if (index < last(v)) {
      of.position = lists.position(v, index);
      const int number = lists.number(v, index);
      if (role == Role::kKeys || lists.has_row(number)) {
        const int place = lists.begin(v, number) - first(v);
        of.head = place < 0 ? 0 : place;
      }
    }
    store_shared(facts(role, v, token), of);
    if (role == Role::kKeys) return;
    const int64_t at = stats_index(a, unknown(lists.pair), head, of.position), step = stats_step(a);
#pragma unroll
    for (int k = 0; k < kKnown; ++k) {
      const float* from = k < 2 ? a.row_stats + (2 * k + v) * step : a.d + v * step;
      store_shared(stats(v, k) + token, of.head < 0 ? 0.0f : load_global(from + at));
    }
  }

  // Copies the features [feature, feature + kD) of the tokens that were described, and zeros for all others.
  EAR_OPS_DEVICE void gather(Role role, int v, int feature) const {
    using Layout = SharedVectors<T, kD>;
    constexpr int kElements = 16 / sizeof(T), kAccesses = kD / kElements;
    constexpr int kPass = kThreads / kAccesses;  // tokens that the block copies at a time
    static_assert(kThreads % kAccesses == 0, "a thread copies the same features of all its tokens");
    const HeadsPointer& of = role == Role::kQueries ? a.query[v] : a.key[v];
    const int of_head = role == Role::kQueries ? head : key_head;
    const T* from = static_cast<const T*>(of.data) + unknown(lists.pair) * of.strides.batch + of_head * of.strides.head;
    char* const to = vectors(role, v);
    if (a.vectorized) {
      const int thread = thread_anew(), c = thread % kAccesses * kElements;
      const bool exists = feature + c < a.dim;
      const T* const first = exists ? from + feature + c : from;
      const int step = static_cast<int>(of.strides.row);  // has room, where rows are read like this
#pragma unroll 2
      for (int n = 0; n < kOwned; n += kPass) {
        const int token = n + thread / kAccesses;
        const TokenFacts facts_of = load_shared<TokenFacts>(facts(role, v, token));
        copy_async<16>(to + Layout::offset(token, c), first + static_cast<int64_t>(facts_of.position) * step,
                       exists && facts_of.head >= 0);
      }
      return;
    }
#pragma unroll 1
    for (int i = thread_anew(); i < kOwned * kD; i += kThreads) {
      const int token = i / kD, c = i % kD;
      const TokenFacts facts_of = load_shared<TokenFacts>(facts(role, v, token));
      const bool real = facts_of.head >= 0 && feature + c < a.dim;
      const T* at = from + facts_of.position * of.strides.row + (feature + c) * of.strides.column;
      store_shared(to + Layout::offset(token, c), real ? load_global(at) : T{});
    }
  }

  // Brings the vectors of a tile, where they are not there yet.
  template <int kKnown>
  EAR_OPS_DEVICE void bring(const WordTile& tile, int chunk) {
    const Loaded before = load_shared<Loaded>(loaded());
    const bool missing[2] = {chunks > 1 || !(before.queries == tile.query), chunks > 1 || !(before.keys == tile.key)};
    if (!missing[0] && !missing[1]) return;
    sync_block();  // what lies there may still be read
    if (thread_index() == 0) store_shared(loaded(), Loaded{tile.query, tile.key});
    if (missing[0]) describe<kKnown>(Role::kQueries, tile.query, tile.query_end);
    if (missing[1]) describe<kKnown>(Role::kKeys, tile.key, tile.key_end);
    sync_block();
#pragma unroll 1
    for (int k = 0; k < 4; ++k)
      if (k < 2 ? missing[0] : missing[1]) gather(k < 2 ? Role::kQueries : Role::kKeys, k % 2, chunk * kD);
    commit_copies();
    wait_copies<0>();
    sync_block();
    if constexpr (Products<T>::kSplit) {
#pragma unroll 1
      for (int k = 0; k < 8; ++k)  // half of the vectors at a time, because registers are few
        if (k < 4 ? missing[0] : missing[1])
          Products<T>::template split<kD, kOwned / 2, kWarps>(vectors(k < 4 ? Role::kQueries : Role::kKeys, k / 2 % 2) +
                                                              k % 2 * (Memory::kVectors / 2));
      sync_block();
    }
  }

  // Writes down where the words of a strip, which are rows of M, and of another one, its columns, have their heads.
  EAR_OPS_DEVICE void describe_map(Which rows, Which columns) const {
    const Strip i = strip(rows), j = strip(columns);
    const int thread = thread_anew(), v = thread / kOwned, word = thread % kOwned;
    if (word >= a.strip_tokens) return;
    const int row = i.number + word, column = j.number + word;
    const bool counts = word < i.words && lists.has_row(row);
    float* const of_row = row_facts(word);
    store_shared(of_row + v, counts ? lists.begin(v, row) - i.from(v) : kNoHead);
    store_shared(of_row + 2 + v, counts ? reciprocal_fast(static_cast<float>(lists.pieces(v, row))) : 0.0f);
    const bool exists = word < j.words && lists.pieces(v, column) > 0;
    store_shared(column_facts(word) + v, exists ? lists.begin(v, column) - j.from(v) : kNoHead);
  }
};

}  // namespace ear_ops::cuda
