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
template <int kN, Role kOwner>
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
    return !visited().masked() || Real<kN>(visited(), first_visited).any();
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
template <typename T, int kD, int kN, Role kOwner, int kStatRows = kRowStats>
struct Stages {
  static constexpr int kOwnedBytes = views_bytes<T, kD>();
  static constexpr int kVisitedBytes = 2 * SharedVectors<T, kD>::bytes(kN);
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

  EAR_OPS_DEVICE void fill_chunk(int stage, const Steps<kN, kOwner>& step, int chunk, bool first) const {
    copy_vectors<T, kD, kN, kThreads>(visited(stage), step.visited(), step.first_visited, chunk * kD);
    if (first || chunks > 1) copy_vectors<T, kD, kOwned, kThreads>(owned(stage), vectors, first_owned, chunk * kD);
  }
  // Makes a stage ready for products. kClears: what masks hide becomes zero.
  template <bool kClears>
  EAR_OPS_DEVICE void prepare(int stage, const Steps<kN, kOwner>& step, bool first) const {
    const bool with_owned = first || chunks > 1;
    if constexpr (kClears) {
      const bool of_visited = step.visited().masked(), of_owned = with_owned && vectors.masked();
      if (of_visited) clear_hidden<T, kD, kN, kThreads>(visited(stage), Real<kN>(step.visited(), step.first_visited));
      if (of_owned) clear_hidden<T, kD, kOwned, kThreads>(owned(stage), Real<kOwned>(vectors, first_owned));
      if (of_visited || of_owned) sync_block();
    }
    if constexpr (Products<T>::kSplit) {
      Products<T>::template split<kD, 2 * kN, kThreads / kWarp>(visited(stage));
      if (with_owned) Products<T>::template split<kD, 2 * kOwned, kThreads / kWarp>(owned(stage));
      sync_block();
    }
  }
  EAR_OPS_DEVICE void fill(int stage, const Steps<kN, kOwner>& step, bool first) const {
    fill_chunk(stage, step, step.chunk, first);
    if (kOwner == Role::kQueries) return;
    copy_stats<kStatRows, kN, kThreads>(stats(stage), vectors.args, step.pair, step.head, step.first_visited);
  }
};

// Calls body(step, scores, stage) for every tile, with the bare products of vectors. The stage then holds the owned and
// the visited vectors of the block's own chunk; where another chunk came last, they are loaded once more. kClears: what
// masks hide is zero in both.
template <bool kClears, typename T, int kD, int kN, Role kOwner, int kStatRows, typename Body>
EAR_OPS_DEVICE void for_tiles(const Stages<T, kD, kN, kOwner, kStatRows>& stages, Steps<kN, kOwner> step,
                              const Body& body) {
  if (step.done()) return;
  Steps<kN, kOwner> ahead = step;
  stages.fill(0, ahead, true);
  commit_copies();
  ahead.advance();
  float scores[2][kN / 8][4];
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
    add_scores<T, kD, kN, kOwner>(stages.owned(stage), stages.visited(stage), scores);
    if (step.is_last_chunk()) {
      if (step.chunk != step.own_chunk) {
        sync_block();
        stages.fill_chunk(stage, step, step.own_chunk, false);
        commit_copies();
        wait_copies<0>();
        sync_block();
        stages.template prepare<kClears>(stage, step, false);
      }
      body(step, scores, stage);
    }
    sync_block();
    step.advance();
  }
}

}  // namespace ear_ops::cuda
