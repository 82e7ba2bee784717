// The gradient of 64 queries or 64 keys, from the statistics that the forward kept.
#pragma once

#include "qk_steps.cuh"

namespace ear_ops::cuda {

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
                p[v] = product(exponential(scores[v][n][e], stat[0]), stat[1]);
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
