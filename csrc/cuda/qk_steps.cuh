// The tiles of a block of threads, one after the other: where the block is, what is on its way to it, and the scores.
//
//   global memory   vectors of tile i + 1
//                     | cp.async
//   shared memory   stage 0: tile i   stage 1: tile i + 1   owned vectors
//                     | mma
//   registers       scores of tile i, summed over all chunks of the head dimension; then the stages change places
#pragma once

#include "qk_scores.cuh"

namespace ear_ops::cuda {

// Where a block is on its way over everything it visits: the heads of the group, the tiles of a head, the chunks of the
// head dimension. It passes over tiles in which nothing is compared. Every pass sums the chunks in one order, since the
// backward subtracts what the forward has summed.
template <int kN, Role kOwner, int kViews = 2>
struct Steps {
  static constexpr Role kVisitedRole = kOwner == Role::kQueries ? Role::kKeys : Role::kQueries;
  const QKArgs& a;
  int64_t pair;
  int first_owned, chunks, own_chunk;
  int head, end_head, first_visited, chunk;

  // Query heads [head, end_head): all of the group for an owner of keys, one for an owner of queries.
  EAR_OPS_DEVICE Steps(const QKArgs& a, int64_t pair, int first_owned, int head, int end_head, int chunks,
                       int own_chunk)
      : a(a),
        pair(pair),
        first_owned(first_owned),
        chunks(chunks),
        own_chunk(own_chunk),
        head(head),
        end_head(end_head),
        first_visited(0),
        chunk(0) {
    find_tile();
  }
  EAR_OPS_DEVICE bool done() const { return head >= end_head; }
  EAR_OPS_DEVICE bool is_first_chunk() const { return chunk == 0; }
  EAR_OPS_DEVICE bool is_last_chunk() const { return chunk == chunks - 1; }
  EAR_OPS_DEVICE Vectors<kVisitedRole> visited() const {
    return {a, pair, kOwner == Role::kQueries ? head / (a.heads / a.key_heads) : head};
  }
  EAR_OPS_DEVICE void advance() {
    if (++chunk < chunks) return;
    chunk = 0;
    first_visited += kN;
    find_tile();
  }

 private:
  EAR_OPS_DEVICE bool compares() const {
    const bool queries = kOwner == Role::kQueries;
    if (!Structure(a).allows_any(queries ? first_owned : first_visited, queries ? kOwned : kN,
                                 queries ? first_visited : first_owned, queries ? kN : kOwned))
      return false;
    return !visited().masked() || Real<kN, kViews>(visited(), first_visited).any();
  }
  EAR_OPS_DEVICE void find_tile() {
    for (; head < end_head; ++head, first_visited = 0)
      for (; first_visited < visited().count(); first_visited += kN)
        if (compares()) return;
  }
};

// Copies the statistics of the queries [first, first + kCount) into shared memory, as [kStats, kCount], and zeros for
// those that do not exist.
template <int kStats, int kCount, int kThreads>
EAR_OPS_DEVICE void copy_stats(char* to, const QKArgs& a, int64_t pair, int head, int first) {
  for (int i = thread_index(); i < kStats * kCount; i += kThreads) {
    const int query = first + i % kCount;
    const bool exists = query < a.queries;
    const float* from = a.row_stats;
    if (exists) from += i / kCount * stats_step(a) + stats_index(a, pair, head, query);
    copy_async<4>(to + i * 4, from, exists);
  }
}

// Two stages in shared memory: while one is worked on, the next is on its way. What the block owns is loaded once;
// where the head dimension has several chunks it is loaded with every stage.
template <typename Element, int kFeatures, int kVisits, Role kOwnerRole, int kStatRows = kRowStats, int kOfViews = 2>
struct Stages {
  using T = Element;
  using Tiles = Steps<kVisits, kOwnerRole, kOfViews>;
  static constexpr int kD = kFeatures, kN = kVisits, kViews = kOfViews;
  static constexpr Role kOwner = kOwnerRole;
  static constexpr int kOwnedBytes = views_bytes<T, kD, kViews>();
  static constexpr int kVisitedBytes = kViews * SharedVectors<T, kD>::bytes(kN);
  static constexpr int kStats = kOwner == Role::kKeys ? kStatRows * kN * 4 : 0;
  static EAR_OPS_CONSTANT int64_t bytes(int chunks) {
    return chunks == 1 ? kOwnedBytes + 2 * (kVisitedBytes + kStats) : 2 * (kOwnedBytes + kVisitedBytes + kStats);
  }

  const Vectors<kOwner>& vectors;  // that the block owns
  int first_owned, chunks;

  EAR_OPS_DEVICE char* visited(int stage) const { return shared_memory() + stage * (kVisitedBytes + kStats); }
  EAR_OPS_DEVICE char* stats(int stage) const { return visited(stage) + kVisitedBytes; }
  EAR_OPS_DEVICE char* owned(int stage) const {
    return shared_memory() + 2 * (kVisitedBytes + kStats) + (chunks == 1 ? 0 : stage) * kOwnedBytes;
  }

  EAR_OPS_DEVICE void fill_chunk(int stage, const Tiles& step, int chunk, bool first) const {
    copy_vectors<T, kD, kN, kThreads, kViews>(visited(stage), step.visited(), step.first_visited, chunk * kD);
    if (first || chunks > 1)
      copy_vectors<T, kD, kOwned, kThreads, kViews>(owned(stage), vectors, first_owned, chunk * kD);
  }
  // Makes a stage ready for products. kClears: what masks hide becomes zero.
  template <bool kClears>
  EAR_OPS_DEVICE void prepare(int stage, const Tiles& step, bool first) const {
    const bool with_owned = first || chunks > 1;
    if constexpr (kClears) {
      const bool of_visited = step.visited().masked(), of_owned = with_owned && vectors.masked();
      if (of_visited)
        clear_hidden<T, kD, kN, kThreads>(visited(stage), Real<kN, kViews>(step.visited(), step.first_visited));
      if (of_owned) clear_hidden<T, kD, kOwned, kThreads>(owned(stage), Real<kOwned, kViews>(vectors, first_owned));
      if (of_visited || of_owned) sync_block();
    }
    if constexpr (Products<T>::kSplit) {
      Products<T>::template split<kD, kViews * kN, kThreads / kWarp>(visited(stage));
      if (with_owned) Products<T>::template split<kD, kViews * kOwned, kThreads / kWarp>(owned(stage));
      sync_block();
    }
  }
  EAR_OPS_DEVICE void fill(int stage, const Tiles& step, bool first) const {
    fill_chunk(stage, step, step.chunk, first);
    if (kOwner == Role::kQueries) return;
    copy_stats<kStatRows, kN, kThreads>(stats(stage), vectors.args, step.pair, step.head, step.first_visited);
  }
  // After the last chunk of a tile: loads the block's own chunk once more, where that is another.
  template <bool kClears>
  EAR_OPS_DEVICE void fill_own_chunk(int stage, const Tiles& step) const {
    if (step.chunk == step.own_chunk) return;
    sync_block();
    fill_chunk(stage, step, step.own_chunk, false);
    commit_copies();
    wait_copies<0>();
    sync_block();
    prepare<kClears>(stage, step, false);
  }
};

// Calls body(step, scores, stage) for every tile, with the bare products of vectors. The stage then holds the owned and
// the visited vectors of the block's own chunk. kClears: what masks hide is zero in both. The stages and the steps are
// those above, or others with the same functions (mean_average.cuh).
template <bool kClears, typename StagesOfTiles, typename StepsOfTiles, typename Body>
EAR_OPS_DEVICE void for_tiles(const StagesOfTiles& stages, StepsOfTiles step, const Body& body) {
  using T = typename StagesOfTiles::T;
  constexpr int kD = StagesOfTiles::kD, kN = StagesOfTiles::kN;
  if (step.done()) return;
  StepsOfTiles ahead = step;
  stages.fill(0, ahead, true);
  commit_copies();
  ahead.advance();
  float scores[StagesOfTiles::kViews][kN / 8][4];
  bool first = true;
  for (int stage = 0; !step.done(); stage ^= 1) {
    if (!ahead.done()) {
      stages.fill(stage ^ 1, ahead, false);
      ahead.advance();
    }
    commit_copies();
    wait_copies<1>();
    sync_block();
    stages.template prepare<kClears>(stage, step, first);
    first = false;
    if (step.is_first_chunk()) clear(scores);
    add_scores<T, kD, kN, StagesOfTiles::kOwner>(stages.owned(stage), stages.visited(stage), scores);
    if (step.is_last_chunk()) {
      stages.template fill_own_chunk<kClears>(stage, step);
      body(step, scores, stage);
    }
    sync_block();
    step.advance();
  }
}

}  // namespace ear_ops::cuda
