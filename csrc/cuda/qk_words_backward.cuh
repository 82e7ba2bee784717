// The gradient of attention between words, from the statistics that the forward kept:
//
//   dS = P (dv/dM / pieces - d) with d = sum over the keys of P dv/dM / pieces
//
//   words_means      writes d of each query: a block of threads takes strips of the queries of a head
//   words_backward   writes dQ of the queries, or dK of the keys, of strips: both views, one chunk of kD features
//
//   shared memory    slopes at the heads of words (qk_words.cuh); queries and keys of both views
//   registers        P of both views --> dS
//                      | mma of dS and visited tokens
//   registers        gradient [64, kD] of both views, summed over all strips, and over the heads of the group for keys
//
// Keys without a word have slopes of 0. Their probabilities count nevertheless, so that they have a gradient.
#pragma once

#include "qk_backward.cuh"
#include "qk_words.cuh"

namespace ear_ops::cuda {

// Calls use(n, e, slope of dv/dM / pieces) for the probabilities of a lane, of one view.
template <typename Block, typename Use>
EAR_OPS_DEVICE void for_slopes(const Block& block, const StripPair& of, int v, const Use& use) {
  constexpr Role kOwner = Block::kQueries ? Role::kQueries : Role::kKeys;
  const int row = of.large ? 1 : Block::Memory::kTileRow;  // how far the slopes of two queries are apart
  const float* owned[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = block.head_of(kOwner, v, owned_of_lane(half));
    owned[half] = block.map(of, v, 0, 0) + (head < 0 ? 0 : head) * (Block::kQueries ? row : 1);
  }
#pragma unroll
  for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int head = block.head_of(Block::kVisitor, v, n * 8 + visited_of_lane(odd));
      const int visited = (head < 0 ? 0 : head) * (Block::kQueries ? 1 : row);
#pragma unroll
      for (int half = 0; half < 2; ++half) use(n, 2 * half + odd, load_shared<float>(owned[half] + visited));
    }
}

// Writes the gradients of the tokens of a tile, of which the rows of a warp are its own.
template <typename T, int kD, Role kRole, typename Block>
EAR_OPS_DEVICE void write_listed(const Block& block, int v, int first, int last, int head, int chunk, float factor,
                                 const float (&gradient)[kD / 8][4]) {
  const WordArgs& a = block.a;
  const int64_t heads = kRole == Role::kQueries ? a.heads : a.key_heads;
  T* memory = static_cast<T*>((kRole == Role::kQueries ? a.query : a.key)[v].gradient);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int index = first + owned_of_lane(half);
    if (index >= last) continue;
    const bool real = kRole == Role::kKeys || block.lists.has_row(block.lists.number(v, index));
    T* to = memory + ((block.lists.pair * heads + head) * a.queries + block.lists.position(v, index)) * a.dim;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int feature = chunk * kD + n * 8 + visited_of_lane(odd);
        T rounded;
        round_to(real ? gradient[n][2 * half + odd] * factor : 0.0f, &rounded);
        if (feature < a.dim) store_global(to + feature, rounded);
      }
  }
}

// Writes the zeros of the padding of a list.
template <typename T, int kD, Role kRole, typename Block>
EAR_OPS_DEVICE void clear_padding(const Block& block, int v, int head, int chunk) {
  const WordArgs& a = block.a;
  const int64_t heads = kRole == Role::kQueries ? a.heads : a.key_heads;
  T* memory = static_cast<T*>((kRole == Role::kQueries ? a.query : a.key)[v].gradient);
  const int count = block.lists.begin(v, 0), lane = thread_index() % kWarp;
  T zero;
  round_to(0.0f, &zero);
#pragma unroll 1
  for (int i = warp_index(); i < count; i += kWarps) {
    T* to = memory + ((block.lists.pair * heads + head) * a.queries + block.lists.position(v, i)) * a.dim;
#pragma unroll 1
    for (int feature = chunk * kD + lane; feature < a.dim && feature < (chunk + 1) * kD; feature += kWarp)
      store_global(to + feature, zero);
  }
}

template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, (WordMemory<T, kD>::kBlocks))
words_means(EAR_OPS_ARGUMENT const WordArgs a) {
  const WordHead at(a);
  WordBlock<T, kD, Role::kQueries, 2> block(a, at.pair, at.head);
  const auto write = [&](int v, int index, float d) {
    store_global(a.d + v * stats_step(a) + stats_index(a, at.pair, at.head, block.lists.position(v, index)), d);
  };
  if (at.block == 0)
#pragma unroll 1
    for (int v = 0; v < 2; ++v)
      for (int i = thread_index(); i < block.lists.begin(v, 0); i += kThreads) write(v, i, 0);
  block.for_own_strips(at.block, at.blocks, [&] {
#pragma unroll 1
    for (int part = 0; part < block.own_tiles(); ++part) {
      float d[2][2] = {};  // of each view and half
      if (block.strip(Which::kOwn).has_rows)
        block.for_strips(Which::kOther, [&] {
          block.template visit<2>(
              part, block.chunks - 1, 0, [&](const StripPair& of) { block.to_slopes(of); },
              [&](const StripPair& of, auto& p) {
#pragma unroll
                for (int v = 0; v < 2; ++v)
                  for_slopes(block, of, v, [&](int n, int e, float slope) {
                    if (p[v][n][e] != 0) d[v][e / 2] += p[v][n][e] * slope;
                  });
              });
        });
      OfViews first, last;
      block.range_of(Which::kOwn, part, &first, &last);
#pragma unroll
      for (int v = 0; v < 2; ++v)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float sum = quad_sum(d[v][half]);
          const int index = first(v) + owned_of_lane(half);
          if (thread_index() % 4 == 0 && index < last(v)) write(v, index, sum);
        }
    }
  });
}

// What dS is multiplied by before it is rounded for the product, and what its gradients are multiplied by at the end.
template <typename T>
EAR_OPS_DEVICE float map_range(Comparison comparison) {
  return with_maps(comparison,
                   [](auto compared) { return std::is_same<T, float16>::value ? decltype(compared)::kRange : 1.0f; });
}
EAR_OPS_DEVICE float map_factor(Comparison comparison) {
  return with_maps(comparison, [](auto compared) { return decltype(compared)::kFactor; });
}

// How many views a block makes the gradients of. Registers do not hold both of floats, whose products are split.
template <typename T>
EAR_OPS_CONSTANT int gradient_views() {
  return Products<T>::kSplit ? 1 : 2;
}

// The gradients of the queries, or keys, that every so many strips of words have, one chunk of their features. head: of
// the queries, or of the keys. first_view: where a block makes the gradients of one view, that one; otherwise 0.
template <typename T, int kD, Role kOwner>
EAR_OPS_DEVICE void words_gradient(const WordArgs& a, int64_t pair, int head, int first_view, int start, int step,
                                   int chunk) {
  constexpr int kViews = gradient_views<T>();
  constexpr bool kQueries = kOwner == Role::kQueries;
  const int group = a.heads / a.key_heads;
  const int first_head = kQueries ? head : head * group, end_head = kQueries ? head + 1 : first_head + group;
  constexpr int kAtOnce = Products<T>::kSplit ? 16 : kOwned;  // visited tokens, for the same reason as in WordScores
  const HeadsPointer* pointers = kQueries ? a.query : a.key;
  const auto wanted = [&](int v) { return pointers[v].gradient && (kViews == 2 || v == first_view); };
  using Block = WordBlock<T, kD, kOwner, kWordStats>;
  Block block(a, pair, first_head);
  if (start == 0)
#pragma unroll 1
    for (int v = 0; v < 2; ++v)
      if (wanted(v)) clear_padding<T, kD, kOwner>(block, v, head, chunk);
  float gradient[kViews][kD / 8][4];
  const auto add_tile = [&](const StripPair& of, auto& p) {
#pragma unroll
    for (int k = 0; k < kViews; ++k) {
      const int v = kViews == 2 ? k : first_view;
      if (!wanted(v)) continue;
      const typename Block::Statistic d(block.stats(v, 2));
      const float share = load_shared<float>(block.share());
      for_slopes(block, of, v, [&](int n, int e, float slope) {
        p[k][n][e] = p[k][n][e] != 0 ? share * (p[k][n][e] * (slope - d(n, e))) : 0.0f;
      });
      const char* values = block.vectors(Block::kVisitor, v);
#pragma unroll
      for (int n = 0; n < kOwned; n += kAtOnce) {
        float some[kAtOnce / 8][4];
#pragma unroll
        for (int i = 0; i < kAtOnce / 8; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) some[i][e] = p[k][n / 8 + i][e];
        Products<T>::template add_weighted<kD, kAtOnce>(some, values + SharedVectors<T, kD>::bytes(n), gradient[k]);
        sync_warp();  // more at a time would need more registers than there are
      }
    }
  };
  block.for_own_strips(start, step, [&] {
#pragma unroll 1
    for (int part = 0; part < block.own_tiles(); ++part) {
      clear(gradient);
#pragma unroll 1
      for (int h = first_head; h < end_head; ++h) {
        const float share =
            load_global(a.grad_sums + pair * a.heads + h) / largest_upstream(a, pair, first_head, end_head);
        if (share == 0) continue;  // slopes may be infinite
        if (thread_index() == 0) store_shared(block.share(), share * map_range<T>(a.comparison));
        if (h != block.head) block.forget();
        block.head = h, block.key_head = kQueries ? h / group : head;
        block.for_strips(Which::kOther, [&] {
          if (block.strip(Block::kRows).has_rows)
            block.template visit<kViews>(
                part, chunk, first_view, [&](const StripPair& of) { block.to_slopes(of); }, add_tile);
        });
      }
      const float factor = map_factor(a.comparison) * a.scale * largest_upstream(a, pair, first_head, end_head) /
                           map_range<T>(a.comparison);
      OfViews first, last;
      block.range_of(Which::kOwn, part, &first, &last);
#pragma unroll
      for (int k = 0; k < kViews; ++k) {
        const int v = kViews == 2 ? k : first_view;
        if (wanted(v))
          write_listed<T, kD, kOwner>(block, v, first(v), last(v), head, unknown(chunk), factor, gradient[k]);
      }
    }
  });
}

// How many blocks share a strip of queries, or of keys, for their gradients: those of the views that have one.
template <typename T>
EAR_OPS_CONSTANT int gradient_turns(const HeadsPointer& first, const HeadsPointer& second) {
  const int views = (first.gradient != nullptr) + (second.gradient != nullptr);
  return views < 2 ? views : 2 / gradient_views<T>();
}

// The blocks of threads of one key head make its queries' gradients first, then its keys'.
template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, 1)
words_backward(EAR_OPS_ARGUMENT const WordArgs a) {
  const int blocks = (a.queries + kOwned - 1) / kOwned;
  const int chunks = (a.dim + kD - 1) / kD, group = a.heads / a.key_heads;
  const int of_queries = gradient_turns<T>(a.query[0], a.query[1]) * group * blocks * chunks;
  const int per_head = of_queries + gradient_turns<T>(a.key[0], a.key[1]) * blocks * chunks;
  const int block = static_cast<int>(block_index());
  int index = block % per_head;
  const int key_head = block / per_head % a.key_heads;
  const int64_t pair = block / per_head / a.key_heads;
  const bool is_of_queries = index < of_queries;
  if (!is_of_queries) index -= of_queries;
  const int chunk = index % chunks, start = index / chunks % blocks, rest = index / chunks / blocks;
  if (is_of_queries) {
    const int head = key_head * group + rest % group, view = a.query[0].gradient ? rest / group : 1;
    words_gradient<T, kD, Role::kQueries>(a, pair, head, view, start, blocks, chunk);
  } else {
    words_gradient<T, kD, Role::kKeys>(a, pair, key_head, a.key[0].gradient ? rest : 1, start, blocks, chunk);
  }
}

}  // namespace ear_ops::cuda
