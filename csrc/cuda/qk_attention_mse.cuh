// Attention-matrix MSE straight from Q and K. A block of threads owns 64 rows, 16 a warp, and visits tiles of columns;
// scores, probabilities and their gradients live in registers. In the forward and for the gradient of the queries it
// owns queries and visits keys; for the gradient of the keys it is the other way round. Every number is written by the
// one block that owns it: no atomics, the same bits every time.
//
// Head dimensions beyond kD come in chunks of kD columns: scores are sums over all of them, and a block makes the
// gradient of one. Lane l = 4 g + t of a warp holds rows g and g + 8 ("half" 0 and 1) and columns 2t, 2t + 1 of
// every 8.
#pragma once

#include "qk_tile.cuh"

namespace ear_ops::cuda {

constexpr float kLog2E = 1.4426950408889634f;

EAR_OPS_DEVICE int warp_index() { return thread_index() / kWarp; }
EAR_OPS_DEVICE int row_of_lane(int half) { return warp_index() * 16 + thread_index() % kWarp / 4 + 8 * half; }
EAR_OPS_DEVICE int column_of_lane(int element) { return thread_index() % 4 * 2 + element % 2; }

EAR_OPS_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
EAR_OPS_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

// What a softmax subtracts: nothing where there is no score at all, so that infinities never meet.
EAR_OPS_DEVICE float shift_of(float maximum) { return maximum == -infinity() ? 0.0f : maximum; }
EAR_OPS_DEVICE float exponential(float score, float shift) { return exp2_fast((score - shift) * kLog2E); }

// The address of a row's statistics [6, B, H, L]; consecutive ones are B * H * L apart.
EAR_OPS_DEVICE int64_t stats_index(const QKArgs& a, int64_t pair, int head, int query) {
  return (pair * a.heads + head) * a.queries + query;
}
EAR_OPS_DEVICE int64_t stats_step(const QKArgs& a) { return a.pairs * a.heads * a.queries; }

// Scores as they come out of the products, to scaled and biased ones; -infinity where a pair is not compared. Sets a
// bit of `alive` (half + 2 view) where one is.
template <int kN, Role kOwner>
EAR_OPS_DEVICE void finish_scores(const QKArgs& a, int64_t pair, int head, int first_row, int first_column,
                                  const bool (&row_real)[2][2], const Real<kN>& column_real,
                                  float (&scores)[2][kN / 8][4], uint32_t* alive) {
  const Structure structure(a);
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int half = e / 2, c = column_of_lane(e);
      const int row = first_row + row_of_lane(half), column = first_column + n * 8 + c;
      const int query = kOwner == Role::kQueries ? row : column, key = kOwner == Role::kQueries ? column : row;
      const bool allowed = structure.allows(query, key);
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        float score = -infinity();
        if (allowed && row_real[v][half] && column_real(v, n, c)) {
          float bias = 0;
          if (a.bias[v].data) {
            const Strides& s = a.bias[v].strides;
            bias = load_global(a.bias[v].data + pair * s.batch + head * s.head + query * s.row + key * s.column);
          }
          if (bias != -infinity()) {
            score = scores[v][n][e] * a.scale + bias;
            *alive |= 1u << (half + 2 * v);
          }
        }
        scores[v][n][e] = score;
      }
    }
}

template <Role kOwner>
EAR_OPS_DEVICE void real_rows(const Rows<kOwner>& rows, int first_row, bool (&real)[2][2]) {
#pragma unroll
  for (int v = 0; v < 2; ++v)
#pragma unroll
    for (int half = 0; half < 2; ++half) real[v][half] = rows.real(v, first_row + row_of_lane(half));
}

// --- forward -------------------------------------------------------------------------------------------------------

struct ForwardRows {  // the statistics of this lane's two rows
  float maximum[2][2], inverse[2][2], d[2][2];
  uint32_t alive;

  EAR_OPS_DEVICE ForwardRows() : alive(0) {
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half) maximum[v][half] = -infinity(), inverse[v][half] = 0, d[v][half] = 0;
  }

  // From this lane's maximum and sum of exponentials to the row's, and its reciprocal: 0 in a row that compares
  // nothing. A row of nothing but -infinity has no softmax either, which must show: in the lanes that hold such scores.
  EAR_OPS_DEVICE void finish() {
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float own = maximum[v][half], shift = shift_of(quad_max(own));
        const float sum = quad_sum(inverse[v][half] * exponential(own, shift));
        maximum[v][half] = shift;
        inverse[v][half] = sum == 0 ? (alive >> (half + 2 * v) & 1 ? not_a_number() : 0.0f) : 1 / sum;
      }
  }
};

// The largest scores of a tile so far into `rows`.
template <int kN>
EAR_OPS_DEVICE void raise_maxima(const float (&scores)[2][kN / 8][4], ForwardRows& rows) {
#pragma unroll
  for (int v = 0; v < 2; ++v)
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) rows.maximum[v][e / 2] = fmaxf(rows.maximum[v][e / 2], scores[v][n][e]);
}

// Scores to exponentials, under maxima that are final, and their sums.
template <int kN>
EAR_OPS_DEVICE void to_exponentials(float (&scores)[2][kN / 8][4], ForwardRows& rows) {
#pragma unroll
  for (int v = 0; v < 2; ++v)
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[v][n][e] = exponential(scores[v][n][e], rows.maximum[v][e / 2]);
        rows.inverse[v][e / 2] += scores[v][n][e];
      }
}

// The same for one tile of many, under a running maximum of this lane: sums so far are rescaled.
template <int kN>
EAR_OPS_DEVICE void add_to_softmax(const float (&scores)[2][kN / 8][4], ForwardRows& rows) {
#pragma unroll
  for (int v = 0; v < 2; ++v)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = rows.maximum[v][half];
      float maximum = before;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
        maximum = fmaxf(maximum, fmaxf(scores[v][n][2 * half], scores[v][n][2 * half + 1]));
      const float shift = shift_of(maximum);
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
        sum += exponential(scores[v][n][2 * half], shift) + exponential(scores[v][n][2 * half + 1], shift);
      rows.inverse[v][half] = rows.inverse[v][half] * exponential(before, shift) + sum;
      rows.maximum[v][half] = maximum;
    }
}

// sum (P - T)^2 over a tile, and the tile's part of d = sum P (P - T) and d_a = sum T (T - P).
template <int kN, bool kExponentials>
EAR_OPS_DEVICE float compare(const float (&scores)[2][kN / 8][4], ForwardRows& rows) {
  float total = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float d[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        float value[2] = {scores[0][n][e], scores[1][n][e]};
        if (!kExponentials)
#pragma unroll
          for (int v = 0; v < 2; ++v) value[v] = exponential(value[v], rows.maximum[v][half]);
        const float p = value[0] * rows.inverse[0][half], t = value[1] * rows.inverse[1][half];
        const float difference = p - t;
        total += difference * difference;
        d[0] += p * difference;
        d[1] -= t * difference;
      }
    rows.d[0][half] += d[0];
    rows.d[1][half] += d[1];
  }
  return total;
}

EAR_OPS_DEVICE void write_forward(const QKArgs& a, int64_t pair, int head, int block, float total, ForwardRows& rows) {
  const int64_t step = stats_step(a);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const float d = quad_sum(rows.d[v][half]);
      const int query = block * kBlockRows + row_of_lane(half);
      if (thread_index() % 4 != 0 || query >= a.queries) continue;
      float* to = a.row_stats + stats_index(a, pair, head, query);
      store_global(to + v * step, rows.maximum[v][half]);
      store_global(to + (2 + v) * step, rows.inverse[v][half]);
      store_global(to + (4 + v) * step, d);
    }
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) total += shuffle_xor(total, lanes);
  char* sums = shared_memory();  // nobody reads tiles any more
  sync_block();
  if (thread_index() % kWarp == 0) store_shared(sums + warp_index() * 4, total);
  sync_block();
  if (thread_index() != 0) return;
  total = 0;
  for (int warp = 0; warp < kThreads / kWarp; ++warp) total += load_shared<float>(sums + warp * 4);
  store_global(a.block_sums + (pair * a.heads + head) * ((a.queries + kBlockRows - 1) / kBlockRows) + block, total);
}

template <typename T, int kD>
EAR_OPS_CONSTANT int tile_bytes() {  // of both views
  return 2 * Tile<T, kD>::bytes(kBlockRows);
}

template <int kN>
EAR_OPS_DEVICE void clear(float (&scores)[2][kN][4]) {
#pragma unroll
  for (int v = 0; v < 2; ++v)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[v][n][e] = 0;
}

template <typename T, int kD, int kN>
EAR_OPS_DEVICE void add_scores(const char* owned, const char* visited, float (&scores)[2][kN / 8][4]) {
  using Layout = Tile<T, kD>;
#pragma unroll
  for (int v = 0; v < 2; ++v)
    Products<T>::template add_scores<kD, kN>(owned + v * Layout::bytes(kBlockRows) + Layout::bytes(16) * warp_index(),
                                             visited + v * Layout::bytes(kN), scores[v]);
}

constexpr int kShortKeys = 2 * kColumns;  // rows up to here are compared in one sweep, everything in registers

// Rows of at most kShortKeys keys and kD columns: all of Q and K is asked for at once.
template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, 1)
forward_short(EAR_OPS_ARGUMENT const QKArgs a) {
  const int blocks = (a.queries + kBlockRows - 1) / kBlockRows;
  const int block = block_index() % blocks, head = block_index() / blocks % a.heads;
  const int64_t pair = block_index() / blocks / a.heads;
  const int first_row = block * kBlockRows;
  const Rows<Role::kQueries> queries{a, pair, head};
  const Rows<Role::kKeys> keys{a, pair, head / (a.heads / a.key_heads)};
  ForwardRows rows;
  float total = 0;
  if (Real<kBlockRows>(queries, first_row).any()) {
    char* owned = shared_memory();
    copy_rows<T, kD, kBlockRows>(owned, queries, first_row, 0);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
      if (tile * kColumns < a.keys)
        copy_rows<T, kD, kColumns>(owned + (1 + tile) * tile_bytes<T, kD>(), keys, tile * kColumns, 0);
    commit_copies();
    bool row_real[2][2];
    real_rows(queries, first_row, row_real);
    float scores[2][2][kColumns / 8][4];
    wait_copies<0>();
    sync_block();
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      if (tile * kColumns >= a.keys) continue;
      clear(scores[tile]);
      add_scores<T, kD, kColumns>(owned, owned + (1 + tile) * tile_bytes<T, kD>(), scores[tile]);
      finish_scores<kColumns, Role::kQueries>(a, pair, head, first_row, tile * kColumns, row_real,
                                              Real<kColumns>(keys, tile * kColumns), scores[tile], &rows.alive);
      raise_maxima<kColumns>(scores[tile], rows);
    }
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half) rows.maximum[v][half] = shift_of(quad_max(rows.maximum[v][half]));
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
      if (tile * kColumns < a.keys) to_exponentials<kColumns>(scores[tile], rows);
    rows.finish();
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
      if (tile * kColumns < a.keys) total += compare<kColumns, true>(scores[tile], rows);
  }
  write_forward(a, pair, head, block, total, rows);
}

// --- tiles one after the other ---------------------------------------------------------------------------------------

// Where a block is on its way over everything it visits: the heads of the group, tiles of columns, chunks of the head
// dimension. Tiles without a pair to compare are passed over; the block's own chunk comes last.
template <int kN, Role kOwner>
struct Steps {
  static constexpr Role kVisited = kOwner == Role::kQueries ? Role::kKeys : Role::kQueries;
  const QKArgs& a;
  int64_t pair;
  int first_row, chunks, own_chunk;
  int head, end_head, first_column, chunk;

  // Heads [head, end_head): of the queries for an owner of keys, one otherwise; `key_head` of both.
  EAR_OPS_DEVICE Steps(const QKArgs& a, int64_t pair, int first_row, int head, int end_head, int chunks, int own_chunk)
      : a(a),
        pair(pair),
        first_row(first_row),
        chunks(chunks),
        own_chunk(own_chunk),
        head(head),
        end_head(end_head),
        first_column(0),
        chunk(0) {
    find_tile();
  }
  EAR_OPS_DEVICE bool done() const { return head >= end_head; }
  EAR_OPS_DEVICE bool is_first_chunk() const { return chunk == 0; }
  EAR_OPS_DEVICE bool is_last_chunk() const { return chunk == chunks - 1; }
  EAR_OPS_DEVICE int dim_offset(int kD) const { return (own_chunk + 1 + chunk) % chunks * kD; }
  EAR_OPS_DEVICE Rows<kVisited> visited() const {
    return {a, pair, kOwner == Role::kQueries ? head / (a.heads / a.key_heads) : head};
  }
  EAR_OPS_DEVICE void advance() {
    if (++chunk < chunks) return;
    chunk = 0;
    first_column += kN;
    find_tile();
  }

 private:
  EAR_OPS_DEVICE bool compares() const {
    const bool queries = kOwner == Role::kQueries;
    if (!Structure(a).allows_any(queries ? first_row : first_column, queries ? kBlockRows : kN,
                                 queries ? first_column : first_row, queries ? kN : kBlockRows))
      return false;
    const bool masked = kVisited == Role::kKeys ? a.key_mask != nullptr : a.counted_queries != nullptr;
    return !masked || Real<kN>(visited(), first_column).any();
  }
  EAR_OPS_DEVICE void find_tile() {
    for (; head < end_head; ++head, first_column = 0)
      for (; first_column < visited().count(); first_column += kN)
        if (compares()) return;
  }
};

// Two stages in shared memory: while one is worked on, the next is on its way. What a block owns is loaded once, or, in
// several chunks, with every stage.
template <typename T, int kD, int kN, Role kOwner>
struct Stages {
  static constexpr int kOwned = tile_bytes<T, kD>();
  static constexpr int kVisited = 2 * Tile<T, kD>::bytes(kN);
  static constexpr int kStats = kOwner == Role::kKeys ? kRowStats * kN * 4 : 0;
  static EAR_OPS_CONSTANT int64_t bytes(int chunks) {
    return chunks == 1 ? kOwned + 2 * (kVisited + kStats) : 2 * (kOwned + kVisited + kStats);
  }

  const Rows<kOwner>& rows;
  int first_row, chunks;

  EAR_OPS_DEVICE char* visited(int stage) const { return shared_memory() + stage * (kVisited + kStats); }
  EAR_OPS_DEVICE char* stats(int stage) const { return visited(stage) + kVisited; }
  EAR_OPS_DEVICE char* owned(int stage) const {
    return shared_memory() + 2 * (kVisited + kStats) + (chunks == 1 ? 0 : stage) * kOwned;
  }

  EAR_OPS_DEVICE void fill(int stage, const Steps<kN, kOwner>& step, bool first) const {
    const int offset = step.dim_offset(kD);
    copy_rows<T, kD, kN>(visited(stage), step.visited(), step.first_column, offset);
    if (first || chunks > 1) copy_rows<T, kD, kBlockRows>(owned(stage), rows, first_row, offset);
    if (kOwner == Role::kQueries) return;
    const QKArgs& a = rows.args;
    for (int i = thread_index(); i < kRowStats * kN; i += kThreads) {
      const int query = step.first_column + i % kN;
      const bool there = query < a.queries;
      const float* from = a.row_stats;
      if (there) from += i / kN * stats_step(a) + stats_index(a, step.pair, step.head, query);
      copy_async<4>(stats(stage) + i * 4, from, there);
    }
  }
};

// body(step, scores, stage) for every tile, the scores raw; owned and visited of the block's own chunk are in the
// stage.
template <typename T, int kD, int kN, Role kOwner, typename Body>
EAR_OPS_DEVICE void for_tiles(const Stages<T, kD, kN, kOwner>& stages, Steps<kN, kOwner> step, const Body& body) {
  if (step.done()) return;
  Steps<kN, kOwner> ahead = step;
  stages.fill(0, ahead, true);
  commit_copies();
  ahead.advance();
  float scores[2][kN / 8][4];
  for (int stage = 0; !step.done(); stage ^= 1) {
    if (!ahead.done()) {
      stages.fill(stage ^ 1, ahead, false);
      ahead.advance();
    }
    commit_copies();
    wait_copies<1>();
    sync_block();
    if (step.is_first_chunk()) clear(scores);
    add_scores<T, kD, kN>(stages.owned(stage), stages.visited(stage), scores);
    if (step.is_last_chunk()) body(step, scores, stage);
    sync_block();
    step.advance();
  }
  wait_copies<0>();
}

// Rows of any length, in two sweeps: softmax statistics, then the comparison.
template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, 1)
forward_long(EAR_OPS_ARGUMENT const QKArgs a) {
  const int blocks = (a.queries + kBlockRows - 1) / kBlockRows;
  const int block = block_index() % blocks, head = block_index() / blocks % a.heads;
  const int64_t pair = block_index() / blocks / a.heads;
  const int first_row = block * kBlockRows, chunks = (a.dim + kD - 1) / kD;
  const Rows<Role::kQueries> queries{a, pair, head};
  ForwardRows rows;
  float total = 0;
  if (Real<kBlockRows>(queries, first_row).any()) {
    bool row_real[2][2];
    real_rows(queries, first_row, row_real);
    const Stages<T, kD, kColumns, Role::kQueries> stages{queries, first_row, chunks};
    const Steps<kColumns, Role::kQueries> steps(a, pair, first_row, head, head + 1, chunks, 0);
    auto finish = [&](const Steps<kColumns, Role::kQueries>& step, float (&scores)[2][kColumns / 8][4]) {
      finish_scores<kColumns, Role::kQueries>(a, pair, head, first_row, step.first_column, row_real,
                                              Real<kColumns>(step.visited(), step.first_column), scores, &rows.alive);
    };
    for_tiles(stages, steps, [&](const auto& step, auto& scores, int) {
      finish(step, scores);
      add_to_softmax<kColumns>(scores, rows);
    });
    rows.finish();
    for_tiles(stages, steps, [&](const auto& step, auto& scores, int) {
      finish(step, scores);
      total += compare<kColumns, false>(scores, rows);
    });
  }
  write_forward(a, pair, head, block, total, rows);
}

// --- backward ------------------------------------------------------------------------------------------------------

// Probabilities' gradients are at most 2; as float16 they would vanish long before that matters elsewhere.
template <typename T>
EAR_OPS_DEVICE float gradient_range() {
  return 1;
}
template <>
EAR_OPS_DEVICE float gradient_range<float16>() {
  return 16384;
}

// Registers hold scores, and gradients of kD columns: wide ones leave room for fewer scores, split floats for fewer
// still.
template <typename T>
EAR_OPS_CONSTANT int gradient_columns(int kD) {
  return sizeof(T) == 2 && kD <= 64 ? kColumns : kColumns / 2;
}
template <typename T>
EAR_OPS_CONSTANT int gradient_blocks(int kD) {
  return sizeof(T) == 4 && kD <= 64 ? 3 : 1;
}

// A warp's 16 rows of one view's gradient to memory, through shared memory for accesses of 16 bytes.
template <typename T, int kD>
EAR_OPS_DEVICE void write_gradient(const float (&gradient)[kD / 8][4], float factor, char* scratch, T* to, int rows,
                                   int dim, int columns) {
  using Layout = Tile<T, kD>;
  const int lane = thread_index() % kWarp;
  sync_warp();
#pragma unroll
  for (int n = 0; n < kD / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        T rounded;
        round_to(gradient[n][2 * half + e] * factor, &rounded);
        store_shared(scratch + (lane / 4 + 8 * half) * Layout::kRowBytes +
                         (n * 8 + lane % 4 * 2 + e) * static_cast<int>(sizeof(T)),
                     rounded);
      }
  sync_warp();
  constexpr int kElements = 16 / sizeof(T), kPieces = kD / kElements;
  for (int i = lane; i < 16 * kPieces; i += kWarp) {
    const int row = i / kPieces, c = i % kPieces * kElements;
    if (row >= rows || c >= columns) continue;
    const char* from = Layout::at(scratch, row, c);
    if (dim % kElements == 0) {
      store_global(reinterpret_cast<Piece*>(to + static_cast<int64_t>(row) * dim + c), load_shared<Piece>(from));
    } else {
      for (int e = 0; e < kElements && c + e < columns; ++e)
        store_global(to + static_cast<int64_t>(row) * dim + c + e,
                     load_shared<T>(from + e * static_cast<int>(sizeof(T))));
    }
  }
}

// The gradient of 64 queries or keys, one chunk of their columns.
template <typename T, int kD, Role kOwner>
EAR_OPS_DEVICE void gradient_block(const QKArgs& a, int64_t pair, int head, int block, int own_chunk) {
  constexpr int kN = gradient_columns<T>(kD);
  constexpr bool kQueries = kOwner == Role::kQueries;
  const int first_row = block * kBlockRows, chunks = (a.dim + kD - 1) / kD, group = a.heads / a.key_heads;
  const Rows<kOwner> rows{a, pair, head};
  const int first_head = kQueries ? head : head * group, end_head = kQueries ? head + 1 : first_head + group;
  const HeadsView* views = kQueries ? a.query : a.key;
  const bool wanted[2] = {views[0].gradient != nullptr, views[1].gradient != nullptr};

  float gradient[2][kD / 8][4];
  clear(gradient);
  bool row_real[2][2];
  real_rows(rows, first_row, row_real);
  float row_stats[3][2][2];  // of the rows, where they are queries
  if (kQueries) {
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = first_row + row_of_lane(half);
#pragma unroll
        for (int k = 0; k < 3; ++k)
          row_stats[k][v][half] =
              query < a.queries
                  ? load_global(a.row_stats + (2 * k + v) * stats_step(a) + stats_index(a, pair, head, query))
                  : 0.0f;
      }
  }
  // The upstream gradient is one number a head: it is multiplied in at the end, the heads of a group by their share.
  float upstream = 0;
  for (int h = first_head; h < end_head; ++h) {
    const float one = load_global(a.grad_sums + pair * a.heads + h);
    upstream = end_head - first_head == 1 ? one : fmaxf(upstream, fabsf(one));
  }
  if (upstream == 0) upstream = 1;

  const Stages<T, kD, kN, kOwner> stages{rows, first_row, chunks};
  if (Real<kBlockRows>(rows, first_row).any()) {
    for_tiles(
        stages, Steps<kN, kOwner>(a, pair, first_row, first_head, end_head, chunks, own_chunk),
        [&](const auto& step, auto& scores, int stage) {
          uint32_t alive = 0;
          finish_scores<kN, kOwner>(a, pair, step.head, first_row, step.first_column, row_real,
                                    Real<kN>(step.visited(), step.first_column), scores, &alive);
          const float share = load_global(a.grad_sums + pair * a.heads + step.head) / upstream * gradient_range<T>();
#pragma unroll
          for (int n = 0; n < kN / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float p[2], d[2];
#pragma unroll
              for (int v = 0; v < 2; ++v) {
                float stat[3];
#pragma unroll
                for (int k = 0; k < 3; ++k)
                  stat[k] = kQueries ? row_stats[k][v][e / 2]
                                     : load_shared<float>(stages.stats(stage) +
                                                          ((2 * k + v) * kN + n * 8 + column_of_lane(e)) * 4);
                p[v] = exponential(scores[v][n][e], stat[0]) * stat[1];
                d[v] = stat[2];
              }
#pragma unroll
              for (int v = 0; v < 2; ++v)
                scores[v][n][e] = scores[v][n][e] == -infinity() ? 0.0f : share * (p[v] * ((p[v] - p[1 - v]) - d[v]));
            }
          const auto add = [&](int v) {
            Products<T>::template add_weighted<kD, kN>(scores[v], stages.visited(stage) + v * Tile<T, kD>::bytes(kN),
                                                       gradient[v]);
          };
          if (wanted[0] && wanted[1]) {
            add(0);
            sync_warp();  // both at a time would need more registers than there are
            add(1);
          } else if (wanted[0]) {
            add(0);
          } else {
            add(1);
          }
        });
  }
  const int row = first_row + warp_index() * 16, column = own_chunk * kD;
  const float factor = 2 * a.scale * upstream / gradient_range<T>();
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    if (!wanted[v]) continue;
    const int64_t heads = kQueries ? a.heads : a.key_heads;
    T* to = static_cast<T*>(views[v].gradient) + ((pair * heads + head) * rows.count() + row) * a.dim + column;
    char* scratch = stages.owned(0) + v * Tile<T, kD>::bytes(kBlockRows) + Tile<T, kD>::bytes(16) * warp_index();
    write_gradient<T, kD>(gradient[v], factor, scratch, to, rows.count() - row, a.dim, a.dim - column);
  }
}

EAR_OPS_DEVICE bool wants(const HeadsView (&views)[2]) { return views[0].gradient || views[1].gradient; }

// Blocks that make gradients: of one key head first its queries', then its keys', so that what they read is at hand.
template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, (gradient_blocks<T>(kD)))
backward(EAR_OPS_ARGUMENT const QKArgs a) {
  const int chunks = (a.dim + kD - 1) / kD, group = a.heads / a.key_heads;
  const int query_blocks = (a.queries + kBlockRows - 1) / kBlockRows,
            key_blocks = (a.keys + kBlockRows - 1) / kBlockRows;
  const int64_t of_queries = wants(a.query) ? static_cast<int64_t>(group) * query_blocks * chunks : 0;
  const int64_t per_head = of_queries + (wants(a.key) ? static_cast<int64_t>(key_blocks) * chunks : 0);
  int64_t index = block_index() % per_head;
  const int key_head = block_index() / per_head % a.key_heads;
  const int64_t pair = block_index() / per_head / a.key_heads;
  if (index < of_queries) {
    const int head = key_head * group + index / chunks / query_blocks;
    gradient_block<T, kD, Role::kQueries>(a, pair, head, index / chunks % query_blocks, index % chunks);
  } else {
    index -= of_queries;
    gradient_block<T, kD, Role::kKeys>(a, pair, key_head, index / chunks, index % chunks);
  }
}

}  // namespace ear_ops::cuda
