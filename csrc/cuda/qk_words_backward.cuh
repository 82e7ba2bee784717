// The gradient of attention between words, from the statistics that the forward kept:
//
//   dS = P (dv/dM / pieces - d) with d = sum over the keys of P dv/dM / pieces
//
//   words_means      writes d of each query: a block of threads owns the queries of 32 words
//   words_backward   writes dQ of the queries, or dK of the keys, of 32 words: one view, one chunk of kD features
//
//   shared memory    slopes of 32 x 32 words (qk_words.cuh); queries and keys of one view
//                      | mma of owned and visited tokens
//   registers        P of 64 x 64 tokens --> dS
//                      | mma of dS and visited tokens
//   registers        gradient [64, kD], summed over all strips, and over the heads of the group for keys
//
// Keys without a word have slopes of 0. Their probabilities count nevertheless, so that they have a gradient.
#pragma once

#include "qk_backward.cuh"
#include "qk_words.cuh"

namespace ear_ops::cuda {

// dS of a tile, up to a factor, in the place of P.
template <typename Block>
EAR_OPS_DEVICE void to_gradients_of_scores(const Block& block, int v, uint32_t compared, float factor,
                                           float (&p)[kOwned / 8][4]) {
#pragma unroll
  for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int owned = owned_of_lane(e / 2), visited = n * 8 + visited_of_lane(e);
      const int query = Block::kQueries ? owned : visited, key = Block::kQueries ? visited : owned;
      float made = 0;
      if (compared >> (4 * n + e) & 1) {
        const int i = block.word_of(Role::kQueries, v, query), j = block.word_of(Role::kKeys, v, key);
        made = factor * (p[n][e] * (load_shared<float>(block.map(v, i, j)) - block.stat(2, v, query)));
      }
      p[n][e] = made;
    }
}

// Writes the gradients of the tokens [first, last) of a list, at most 64, of which the rows of a warp are its own.
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
    const bool real = kRole == Role::kKeys || block.has_row(block.number(v, index));
    T* to = memory + ((block.pair * heads + head) * a.queries + block.position(v, index)) * a.dim;
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

// Writes the zeros of the first `count` tokens of a list, which are not compared.
template <typename T, int kD, Role kRole, typename Block>
EAR_OPS_DEVICE void clear_listed(const Block& block, int v, int count, int head, int chunk) {
  const WordArgs& a = block.a;
  const int64_t heads = kRole == Role::kQueries ? a.heads : a.key_heads;
  T* memory = static_cast<T*>((kRole == Role::kQueries ? a.query : a.key)[v].gradient);
  const int features = a.dim - chunk * kD < kD ? a.dim - chunk * kD : kD;
  for (int64_t i = thread_index(); i < static_cast<int64_t>(count) * features; i += kThreads) {
    const int at = block.position(v, static_cast<int>(i / features));
    T zero;
    round_to(0.0f, &zero);
    store_global(memory + ((block.pair * heads + head) * a.queries + at) * a.dim + chunk * kD + i % features, zero);
  }
}

template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, 1)
words_means(EAR_OPS_ARGUMENT const WordArgs a) {
  const WordStrip at(a);
  WordBlock<T, kD, Role::kQueries> block(a, at.pair, at.head, 2);
  const auto write = [&](int v, int index, float d) {
    store_global(a.d + v * stats_step(a) + stats_index(a, at.pair, at.head, block.position(v, index)), d);
  };
  if (at.strip == 0)
#pragma unroll 1
    for (int v = 0; v < 2; ++v)
      for (int i = thread_index(); i < block.first_query(v, 0); i += kThreads) write(v, i, 0);
  const bool has_rows = block.has_queries(at.strip);
  const auto queries = [&](int v) { return block.end(v, at.strip) - block.first_query(v, at.strip); };
  const int most = queries(0) > queries(1) ? queries(0) : queries(1);
#pragma unroll 1
  for (int part = 0; part < most; part += kOwned) {
    float d[2][2] = {};  // of each view and half
    if (has_rows)
#pragma unroll 1
      for (int j = 0; j < at.strips; ++j) {
        if (!block.has_keys(j)) continue;
        const auto range = [&](int v) {
          const int query = block.first_query(v, at.strip) + part, last = block.end(v, at.strip);
          return WordTile{query, last < query + kOwned ? last : query + kOwned, block.first_key(v, j), block.end(v, j)};
        };
        block.template visit<2>(at.strip, j, 0, range, block.chunks - 1, [&](int v, uint32_t compared, auto& p) {
          float sum[2] = {0, 0};
#pragma unroll
          for (int n = 0; n < kOwned / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              if (!(compared >> (4 * n + e) & 1)) continue;
              const int i = block.word_of(Role::kQueries, v, owned_of_lane(e / 2));
              const int of_key = block.word_of(Role::kKeys, v, n * 8 + visited_of_lane(e));
              sum[e / 2] += p[n][e] * load_shared<float>(block.map(v, i, of_key));
            }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (v == 0) d[0][half] += sum[half];
            if (v == 1) d[1][half] += sum[half];
          }
        });
      }
#pragma unroll
    for (int v = 0; v < 2; ++v)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(d[v][half]);
        const int index = block.first_query(v, at.strip) + part + owned_of_lane(half);
        if (thread_index() % 4 == 0 && index < block.end(v, at.strip)) write(v, index, sum);
      }
  }
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

// The gradient of the queries, or keys, of view v that one strip of words has, one chunk of their features. head: of
// the queries, or of the keys.
template <typename T, int kD, Role kOwner>
EAR_OPS_DEVICE void words_gradient(const WordArgs& a, int64_t pair, int head, int v, int strip, int strips, int chunk) {
  constexpr bool kQueries = kOwner == Role::kQueries;
  const int group = a.heads / a.key_heads;
  const int first_head = kQueries ? head : head * group, end_head = kQueries ? head + 1 : first_head + group;
  constexpr int kAtOnce = Products<T>::kSplit ? 16 : kOwned;  // visited tokens, for the same reason as in WordBlock
  WordBlock<T, kD, kOwner> block(a, pair, first_head, kKnownStats);
  const int first = kQueries ? block.first_query(v, strip) : block.first_key(v, strip), last = block.end(v, strip);
  if (strip == 0) clear_listed<T, kD, kOwner>(block, v, first, head, chunk);
  const float upstream = largest_upstream(a, pair, first_head, end_head), range_of_type = map_range<T>(a.comparison);
#pragma unroll 1
  for (int owned = first; owned < last; owned += kOwned) {
    float gradient[1][kD / 8][4];
    clear(gradient);
#pragma unroll 1
    for (int h = first_head; h < end_head; ++h) {
      const float share = load_global(a.grad_sums + pair * a.heads + h) / upstream;
      if (share == 0) continue;  // slopes may be infinite
      if (h != block.head) block.forget();
      block.head = h;
#pragma unroll 1
      for (int other = 0; other < strips; ++other) {
        const int i = kQueries ? strip : other, j = kQueries ? other : strip;
        if (!block.has_queries(i) || !block.has_keys(j)) continue;
        const int end_owned = last < owned + kOwned ? last : owned + kOwned;
        const auto range = [&](int) {
          return kQueries ? WordTile{owned, end_owned, block.first_key(v, j), block.end(v, j)}
                          : WordTile{block.first_query(v, i), block.end(v, i), owned, end_owned};
        };
        block.template visit<1>(i, j, v, range, chunk, [&](int view, uint32_t compared, auto& p) {
          to_gradients_of_scores(block, view, compared, share * range_of_type, p);
          const char* values = block.vectors(kQueries ? Role::kKeys : Role::kQueries, view);
#pragma unroll
          for (int n = 0; n < kOwned; n += kAtOnce) {
            float some[kAtOnce / 8][4];
#pragma unroll
            for (int k = 0; k < kAtOnce / 8; ++k)
#pragma unroll
              for (int e = 0; e < 4; ++e) some[k][e] = p[n / 8 + k][e];
            Products<T>::template add_weighted<kD, kAtOnce>(some, values + SharedVectors<T, kD>::bytes(n), gradient[0]);
            sync_warp();  // more at a time would need more registers than there are
          }
        });
      }
    }
    const float factor = map_factor(a.comparison) * a.scale * upstream / range_of_type;
    write_listed<T, kD, kOwner>(block, unknown(v), owned, last, head, unknown(chunk), factor, gradient[0]);
  }
}

// How many views have a gradient to be made, and the n-th of them.
EAR_OPS_DEVICE int views_wanted(const HeadsPointer (&pointers)[2]) {
  return (pointers[0].gradient != nullptr) + (pointers[1].gradient != nullptr);
}
EAR_OPS_DEVICE int wanted_view(const HeadsPointer (&pointers)[2], int n) { return pointers[0].gradient ? n : 1; }

// The blocks of threads of one key head make its queries' gradients first, then its keys'.
template <typename T, int kD>
EAR_OPS_KERNEL(kThreads, 1)
words_backward(EAR_OPS_ARGUMENT const WordArgs a) {
  const int strips = (a.numbers + kStripWords - 1) / kStripWords;
  const int chunks = (a.dim + kD - 1) / kD, group = a.heads / a.key_heads;
  const int query_views = views_wanted(a.query), key_views = views_wanted(a.key);
  const int of_queries = query_views * group * strips * chunks, per_head = of_queries + key_views * strips * chunks;
  const int block = static_cast<int>(block_index());
  int index = block % per_head;
  const int key_head = block / per_head % a.key_heads;
  const int64_t pair = block / per_head / a.key_heads;
  const bool is_of_queries = index < of_queries;
  if (!is_of_queries) index -= of_queries;
  const int chunk = index % chunks, strip = index / chunks % strips, rest = index / chunks / strips;
  if (is_of_queries) {
    const int head = key_head * group + rest % group, v = wanted_view(a.query, rest / group);
    words_gradient<T, kD, Role::kQueries>(a, pair, head, v, strip, strips, chunk);
  } else {
    words_gradient<T, kD, Role::kKeys>(a, pair, key_head, wanted_view(a.key, rest), strip, strips, chunk);
  }
}

}  // namespace ear_ops::cuda
