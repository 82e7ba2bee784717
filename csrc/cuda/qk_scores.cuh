// Scores of one tile, in the registers of a block of threads. The block owns 64 vectors, 16 a warp, and visits others
// tile by tile. It owns queries in the forward and for the gradient of the queries, and keys for the gradient of the
// keys. Every number is written by the one block that owns it: no atomics, the same bits every time.
//
// Head dimensions beyond kD come in chunks of kD features. Scores are sums over all chunks, and a block makes the
// gradient of one. Lane l = 4 g + t of a warp holds the scores of the owned vectors g and g + 8 ("half" 0 and 1) with
// the visited vectors 2t and 2t + 1 of every 8:
//
//     visited of the n-th eight    0 1 | 2 3  | 4 5  | 6 7
//     owned g, in lane             4g  | 4g+1 | 4g+2 | 4g+3     as scores[view][n][0], [1]
//     owned g + 8, in lane         4g  | 4g+1 | 4g+2 | 4g+3     as scores[view][n][2], [3]
#pragma once

#include "qk_vectors.cuh"

namespace ear_ops::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLogOf2 = 0.6931471805599453f;

EAR_OPS_DEVICE int warp_index() { return thread_index() / kWarp; }
EAR_OPS_DEVICE int owned_of_lane(int half) { return warp_index() * 16 + thread_index() % kWarp / 4 + 8 * half; }
EAR_OPS_DEVICE int visited_of_lane(int element) { return thread_index() % 4 * 2 + element % 2; }

EAR_OPS_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
EAR_OPS_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

// What a softmax subtracts. Where there is no score at all it subtracts nothing, so that infinities never meet.
EAR_OPS_DEVICE float shift_of(float maximum) { return maximum == -infinity() ? 0.0f : maximum; }
EAR_OPS_DEVICE float exponential(float score, float shift) { return exp2_fast(score - shift); }

// 1 over the sum of exponentials of a row. A row that compares nothing gets 0. One of nothing but -infinity has no
// softmax either: it shows as NaN.
EAR_OPS_DEVICE float inverse_of_row(float sum, bool compares) {
  return sum != 0 ? 1 / sum : compares ? not_a_number() : 0.0f;
}

// A score in units of log 2. One that is finite stays finite, such as the smallest float, which masks are made of.
EAR_OPS_DEVICE float in_log2(float score) {
  constexpr float kLargest = 2.3e38f;
  return (fabsf(score) < infinity() ? fminf(fmaxf(score, -kLargest), kLargest) : score) * kLog2E;
}

// Where the statistics of a query lie in [6, B, H, L]; one statistic follows the other B * H * L floats later.
EAR_OPS_DEVICE int64_t stats_index(const QKArgs& a, int64_t pair, int head, int query) {
  return (pair * a.heads + head) * a.queries + query;
}
EAR_OPS_DEVICE int64_t stats_step(const QKArgs& a) { return a.pairs * a.heads * a.queries; }

// Whether the two owned vectors of a lane take part, in each view.
template <int kViews>
struct RealOwned {
  using Type = bool[kViews][2];  // a name of its own, so that no number of views is read off an empty list
};

// A tile of scores under a bias, or of which positions forbid a part: every score is asked about.
template <int kN, Role kOwner, bool kInLog2, int kViews>
EAR_OPS_DEVICE void finish_each_score(const QKArgs& a, int64_t pair, int head, int first_owned, int first_visited,
                                      const typename RealOwned<kViews>::Type& owned_real,
                                      const Real<kN, kViews>& visited_real, float (&scores)[kViews][kN / 8][4],
                                      uint32_t* alive) {
  constexpr bool kQueries = kOwner == Role::kQueries;
  const Structure structure(a);
  const int owned = first_owned + owned_of_lane(0), visited = first_visited + visited_of_lane(0);
  const int first_query = kQueries ? owned : visited, first_key = kQueries ? visited : owned;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int half = e / 2, across = n * 8 + e % 2;
      const int query = first_query + (kQueries ? 8 * half : across), key = first_key + (kQueries ? across : 8 * half);
      const bool allowed = structure.allows(query, key) && (!kQueries || query < a.queries);
#pragma unroll
      for (int v = 0; v < kViews; ++v) {
        float score = -infinity();
        if (allowed && (kQueries || owned_real[v][half]) && visited_real(v, n, visited_of_lane(e))) {
          float added = 0;
          score = scores[v][n][e] * (kInLog2 ? a.scale * kLog2E : a.scale);
          if (a.bias[v].data) {
            const Strides& s = a.bias[v].strides;
            added = load_global(a.bias[v].data + pair * s.batch + head * s.head + query * s.row + key * s.column);
            score = added == -infinity() ? added
                    : kInLog2            ? in_log2(scores[v][n][e] * a.scale + added)
                                         : scores[v][n][e] * a.scale + added;
          }
          if (added != -infinity()) *alive |= 1u << (half + 2 * v);
        }
        scores[v][n][e] = score;
      }
    }
}

// Turns products of queries and keys into scores; kInLog2: in units of log 2. Where a query and a key are not compared,
// the score becomes -infinity; rows of queries that do not count keep numbers without a meaning. Sets the bit half + 2
// view of `alive` where something is compared. kGeneral: there may be a bias, a window or a causal mask.
template <int kN, Role kOwner, bool kGeneral, bool kInLog2 = true, int kViews>
EAR_OPS_DEVICE void finish_scores(const QKArgs& a, int64_t pair, int head, int first_owned, int first_visited,
                                  const typename RealOwned<kViews>::Type& owned_real,
                                  const Real<kN, kViews>& visited_real, float (&scores)[kViews][kN / 8][4],
                                  uint32_t* alive) {
  constexpr bool kQueries = kOwner == Role::kQueries;
  if constexpr (kGeneral) {
    if (a.bias[0].data || a.bias[1].data ||
        !Structure(a).allows_all(kQueries ? first_owned : first_visited, kQueries ? kOwned : kN,
                                 kQueries ? first_visited : first_owned, kQueries ? kN : kOwned))
      return finish_each_score<kN, kOwner, kInLog2>(a, pair, head, first_owned, first_visited, owned_real, visited_real,
                                                    scores, alive);
  }
  const float factor = kInLog2 ? a.scale * kLog2E : a.scale;
  const bool full = visited_real.full();
#pragma unroll
  for (int v = 0; v < kViews; ++v) {
    if (visited_real.any(v)) *alive |= 3u << (2 * v);
    const float hidden[2] = {owned_real[v][0] ? 0 : -infinity(), owned_real[v][1] ? 0 : -infinity()};
#pragma unroll
    for (int n = 0; n < kN / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[v][n][e] *= factor;
        if (!kQueries) scores[v][n][e] += hidden[e / 2];
      }
    if (full) continue;
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      const uint32_t mine = visited_real.words[v][n / 4] >> visited_of_lane(0);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (!(mine >> (n % 4 * 8 + e % 2) & 1)) scores[v][n][e] = -infinity();
    }
  }
}

// Puts the scores of a tile into the maxima and sums of exponentials of the rows, which all lanes of a row know.
template <int kN, int kViews>
EAR_OPS_DEVICE void measure_rows(const float (&scores)[kViews][kN / 8][4], float (&maximum)[kViews][2],
                                 float (&sum)[kViews][2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int v = 0; v < kViews; ++v) {
      float largest = scores[v][0][2 * half], total = 0;
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
        largest = fmaxf(largest, fmaxf(scores[v][n][2 * half], scores[v][n][2 * half + 1]));
      const float before = maximum[v][half];
      maximum[v][half] = fmaxf(before, quad_max(largest));
      const float shift = shift_of(maximum[v][half]);
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) total += exponential(scores[v][n][e], shift);
      sum[v][half] = sum[v][half] * exponential(before, shift) + quad_sum(total);
    }
}

template <Role kOwner, int kViews>
EAR_OPS_DEVICE void real_owned(const Vectors<kOwner>& owned, int first_owned, bool (&real)[kViews][2]) {
#pragma unroll
  for (int v = 0; v < kViews; ++v)
#pragma unroll
    for (int half = 0; half < 2; ++half) real[v][half] = owned.real(v, first_owned + owned_of_lane(half));
}

template <typename T, int kD, int kViews = 2>
EAR_OPS_CONSTANT int views_bytes() {  // of 64 vectors of all views
  return kViews * SharedVectors<T, kD>::bytes(kOwned);
}

template <int kViews, int kN>
EAR_OPS_DEVICE void clear(float (&scores)[kViews][kN][4]) {
#pragma unroll
  for (int v = 0; v < kViews; ++v)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[v][n][e] = 0;
}

// Of the warp's 16 owned vectors and kN visited ones. In shared memory lie kOwnedRows and kVisitedRows of a view.
template <typename T, int kD, int kN, Role kOwner, int kOwnedRows = kOwned, int kVisitedRows = kN, int kViews>
EAR_OPS_DEVICE void add_scores(const char* owned, const char* visited, float (&scores)[kViews][kN / 8][4]) {
  using Layout = SharedVectors<T, kD>;
#pragma unroll
  for (int v = 0; v < kViews; ++v)
    Products<T>::template add_scores<kD, kN, kOwner == Role::kKeys>(
        owned + v * Layout::bytes(kOwnedRows) + Layout::bytes(16) * warp_index(),
        visited + v * Layout::bytes(kVisitedRows), scores[v]);
}

}  // namespace ear_ops::cuda
