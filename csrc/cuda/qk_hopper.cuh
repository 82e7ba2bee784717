// The forward of qk_forward.cuh for Hopper: rows of any length, without bias, window and causal mask, in 16 bits.
//
//   global memory   Q [192, D] and K [S, D] of both views
//                     | TMA, asked for by one warp, as far ahead as there are stages
//   shared memory   Q, and a ring of tiles of 64 keys
//                     | wgmma
//   registers       scores of 64 x 64 a group of four warps, both views --> running sums, as in qk_forward.cuh
//
// A stage of the ring has two barriers. `full` ends a phase when the copies have arrived, and `empty` when all warps
// have done their products. The two groups of warps wait for nothing else, so the exponentials of one meet the products
// of the other, or those of a second block on the multiprocessor.
#pragma once

#include "block.cuh"
#include "hopper.cuh"
#include "qk_forward.cuh"
#include "qk_hopper.h"

namespace ear_ops::cuda {

struct HopperArgs {
  QKArgs args;
  TensorMap query[2], key[2];  // of each view
};

constexpr int kTileFeatures = kTileRowBytes / 2;  // of a row of a tile; wider vectors take several tiles

// Where a block that owns kRows vectors keeps what in shared memory: first sums and barriers, then tiles
// [view, features / 64, rows] of what it owns, and of what it visits in each stage.
template <int kD, int kOwnedRows>
struct Ring {
  static constexpr int kRows = kOwnedRows, kStages = 4, kTiles = kD / kTileFeatures;
  static constexpr int kConsumers = kRows / 16;              // warps that own 16 vectors each
  static constexpr int kThreads = (kConsumers + 1) * kWarp;  // the last warp asks for copies
  static constexpr int kGroupBytes = 64 * kTileRowBytes;     // of the owned vectors of four warps in a tile
  static constexpr int kOwnedBytes = kRows * kTileRowBytes, kVisitedBytes = kVisited * kTileRowBytes;
  static constexpr int kStageBytes = 2 * kTiles * kVisitedBytes;
  static constexpr int kControl = 256;
  static constexpr int kBytes = kControl + 1024 + 2 * kTiles * kOwnedBytes + kStages * kStageBytes;

  static EAR_OPS_DEVICE char* barrier(int index) { return shared_memory() + 128 + 8 * index; }
  static EAR_OPS_DEVICE char* owned_full() { return barrier(0); }
  static EAR_OPS_DEVICE char* full(int stage) { return barrier(1 + stage); }
  static EAR_OPS_DEVICE char* empty(int stage) { return barrier(1 + kStages + stage); }
  static EAR_OPS_DEVICE char* owned() { return align_tiles(shared_memory() + kControl); }
  static EAR_OPS_DEVICE char* visited(int stage) { return owned() + 2 * kTiles * kOwnedBytes + stage * kStageBytes; }

  static EAR_OPS_DEVICE void init() {
    init_barrier(owned_full(), 1);
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(full(stage), 1);
      init_barrier(empty(stage), kConsumers);
    }
    publish_barriers();
  }

  // Starts to copy the vectors from `first` on, tiles of `bytes`, for which the barrier waits. For one thread.
  static EAR_OPS_DEVICE void copy(char* to, int bytes, const TensorMap (&maps)[2], int first, int head, int pair,
                                  char* barrier) {
    arrive_expecting(barrier, 2 * kTiles * bytes);
    for (int v = 0; v < 2; ++v)
      for (int t = 0; t < kTiles; ++t)
        copy_box(to + (v * kTiles + t) * bytes, &maps[v], t * kTileFeatures, first, head, pair, barrier);
  }

  // Starts the products of a group's owned vectors, which begin `of_group` bytes into a tile, and those of a stage.
  template <typename T>
  static EAR_OPS_DEVICE void start_scores(int of_group, int stage, float (&scores)[2][kVisited / 8][4]) {
    const Matrix of_owned = matrix_at(owned() + of_group), of_visited = matrix_at(visited(stage));
    begin_products();
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int k = 0; k < kTileRowBytes; k += 32)  // 16 features
          multiply_async(T{}, scores[v], further(of_owned, (v * kTiles + t) * kOwnedBytes + k),
                         further(of_visited, (v * kTiles + t) * kVisitedBytes + k), t + k > 0);
    commit_products();
  }

  // Which stage is next, and how often the ring has gone round.
  struct Turn {
    int stage = 0, parity = 0;
    EAR_OPS_DEVICE void advance() {
      if (++stage < kStages) return;
      stage = 0;
      parity ^= 1;
    }
  };
};

// The tiles of keys in which something is compared, one after the other. Every warp finds them for itself.
struct KeyTiles {
  const Vectors<Role::kKeys>& keys;
  int first = 0;
  Real<kVisited> real;

  EAR_OPS_DEVICE explicit KeyTiles(const Vectors<Role::kKeys>& keys) : keys(keys) { find(); }
  EAR_OPS_DEVICE bool done() const { return first >= keys.count(); }
  EAR_OPS_DEVICE void advance() {
    first += kVisited;
    find();
  }

 private:
  EAR_OPS_DEVICE void find() {
    for (; !done(); first += kVisited) {
      real = Real<kVisited>(keys, first);
      if (real.any()) return;
    }
  }
};

template <int kD>
using ForwardRing = Ring<kD, kHopperRows>;

// Work of the last warp: asks for the queries, and for a tile as soon as its stage is empty.
template <int kD>
EAR_OPS_DEVICE void copy_tiles(const HopperArgs& h, const Vectors<Role::kQueries>& queries, int first_query,
                               const Vectors<Role::kKeys>& keys) {
  using R = ForwardRing<kD>;
  const bool asks = thread_index() % kWarp == 0;
  const int pair = static_cast<int>(queries.pair);
  if (asks) R::copy(R::owned(), R::kOwnedBytes, h.query, first_query, queries.head, pair, R::owned_full());
  typename R::Turn turn;
  for (KeyTiles tile(keys); !tile.done(); tile.advance(), turn.advance()) {
    wait_phase(R::empty(turn.stage), turn.parity ^ 1);
    if (asks)
      R::copy(R::visited(turn.stage), R::kVisitedBytes, h.key, tile.first, keys.head, pair, R::full(turn.stage));
  }
}

// Work of the other warps: the scores of 16 queries each.
template <typename T, int kD>
EAR_OPS_DEVICE void add_tiles(const Vectors<Role::kQueries>& queries, const Vectors<Role::kKeys>& keys,
                              Mse::Rows* rows) {
  using R = ForwardRing<kD>;
  const int of_group = uniform(warp_index() / 4) * R::kGroupBytes;
  typename R::Turn turn;
  wait_phase(R::owned_full(), 0);
  for (KeyTiles tile(keys); !tile.done(); tile.advance(), turn.advance()) {
    float scores[2][kVisited / 8][4];
    wait_phase(R::full(turn.stage), turn.parity);
    R::template start_scores<T>(of_group, turn.stage, scores);
    wait_products(scores);
    if (thread_index() % kWarp == 0) arrive(R::empty(turn.stage));
    finish_scores<kVisited, Role::kQueries, false>(queries.args, queries.pair, queries.head, 0, 0, {}, tile.real,
                                                   scores, &rows->alive);
    rows->template add<kVisited>(scores);
  }
}

template <typename T, int kD>
EAR_OPS_KERNEL(ForwardRing<kD>::kThreads, 1)
forward_hopper(EAR_OPS_ARGUMENT const HopperArgs h) {
  using R = ForwardRing<kD>;
  const QKArgs& a = h.args;
  const QueryBlock<R::kRows> at(a);
  const int first_query = at.block * R::kRows;
  const Vectors<Role::kQueries> queries{a, at.pair, at.head};
  const Vectors<Role::kKeys> keys{a, at.pair, at.key_head(a)};
  if (thread_index() == 0) R::init();
  sync_block();
  const bool counted = Real<R::kRows>(queries, first_query).any();
  float total = 0;
  if (warp_index() < R::kConsumers) {
    Mse::Rows rows;
    if (counted) add_tiles<T, kD>(queries, keys, &rows);
    total = write_rows<R::kRows, Mse>(queries, at.block, rows);
  } else if (counted) {
    copy_tiles<kD>(h, queries, first_query, keys);
  }
  total = block_sum<R::kThreads>(total);
  const int blocks = (a.queries + R::kRows - 1) / R::kRows;
  if (thread_index() == 0) store_global(a.block_sums + (at.pair * a.heads + at.head) * blocks + at.block, total);
}

}  // namespace ear_ops::cuda
