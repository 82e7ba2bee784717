// The inner loops of the CPU kernels as tables of function pointers, one table for each instruction set, chosen at run
// time. Lengths that are called padded are multiples of kLanes. Packed rows are padded with zeros.
#pragma once

#include <cstdint>

#include "../comparison.h"

namespace ear_ops::cpu {

constexpr int64_t kLanes = 16;  // elements that packed rows are padded to
constexpr int64_t kTile = 256;  // keys of a tile

enum class Kind : int { kFloat32, kFloat64, kBFloat16, kFloat16 };  // element types of tensors

// kLanes queries of a block in one tile, the queries side by side: scores[view][key * ld + query]. The scores come in
// as raw products; each function of the table says what it leaves in their place.
template <typename A>
struct LaneGroup {
  A* scores[2];
  int64_t ld, keys;
  A scale;
  const uint8_t* real[2];  // [keys] of each view; null: all keys are real in both
  const A* bias[2];        // laid out as the scores and added to the scaled ones, -inf masks; null: none
  const A* first;          // [kLanes] a query may attend to the keys [first, last) of the tile, by position (causal,
  const A* last;           //   window), counted from the tile's first key; null: to all
};

// What kLanes queries have of the keys that they have seen: P^ = exp(score - max) of the first view and T^ of the
// second are summed, and what the comparison makes of them.
template <typename A>
struct RunningRows {
  A max[2][kLanes], sum[2][kLanes];  // of each view
  A of_comparison[5][kLanes];
};

// The statistics of kLanes queries. P = exp(score - max) * inverse; the inverse of a query without keys is 0. They are
// not one log sum exp, because the rounding of a large one alone is more than the gradient may lose.
template <typename A>
struct LaneStats {
  A max[2][kLanes], inverse[2][kLanes];  // of each view
  A of_comparison[2][kLanes];            // what its gradient takes beside P and T
};

// The averages over the heads of kLanes queries in one tile, laid out as the scores; mean_loops.h has the symbols.
template <typename A>
struct Averages {
  A* sum[2];  // of f_h e_h over the heads
  A* top[2];  // M; null where the comparison takes no logarithm
  A divisor[2];
  int64_t ld, keys;
};

// The loops over scores of one view, which are scores[0] of a lane group, and over the averages of both.
template <typename A>
struct MeanLoops {
  // Adds a tile of raw scores of one head to the max and sum [kLanes] of its rows.
  void (*add_softmax)(const LaneGroup<A>& group, A* max, A* sum);
  // The same in two steps, for rows whose scores all stay: raise_max of all tiles, then exponentiate of all, which
  // leaves e_h with M = 0. Both take the same groups; exponentiate does not read their masks and bias.
  void (*raise_max)(const LaneGroup<A>& group, A* max);
  void (*exponentiate)(const LaneGroup<A>& group, const A* max, A* sum);
  // sum += f_h e_h, after exponentiate. `factor` [kLanes] is f_h, 0 in rows that do not count.
  void (*add_exponentials)(const LaneGroup<A>& group, const A* factor, A* sum);
  // Raw scores become score - max, and `top` is raised to the largest of them.
  void (*raise_top)(const LaneGroup<A>& group, const A* max, A* top);
  // Raw scores become e_h, and sum += f_h e_h. `top` null: M is 0, else raise_top has seen all heads.
  void (*add_head)(const LaneGroup<A>& group, const A* max, const A* factor, const A* top, A* sum);
  // Returns the sum of a comparison's entries. `sum` becomes F, and `top` becomes E.
  A (*compare[3])(const Averages<A>& averages);  // by Comparison
  // d [kLanes] += the sum of e_h F over the keys.
  void (*add_slopes)(const LaneGroup<A>& group, const A* slopes, A* d);
  // e_h becomes the gradient of raw scores, scale f_h e_h (F - E d); `peak` null: E is 1.
  void (*head_gradient)(const LaneGroup<A>& group, const A* slopes, const A* peak, const A* factor, const A* d);
  // The same, rounded to operands of n keys, zero beyond those of the group: `left` [n, ld] and `right` [n / 2, ld, 2],
  // of which null is not asked for. Only of float.
  void (*head_gradient_bits)(const LaneGroup<A>& group, const A* slopes, const A* peak, const A* factor, const A* d,
                             int64_t n, uint16_t* left, uint16_t* right, int64_t ld);
};

// What kLanes queries of one view have seen of their keys, for sums over the keys of each word.
template <typename A>
struct WordRows {
  A max[kLanes], sum[kLanes];  // the largest score, and the sum of exp(score - max)
  A alive[kLanes];             // 1 once there was a key that the query may attend to, else 0
};

// Rows of attention maps of both views, the elements of each side by side.
struct RowPairs {
  Kind kind;
  const void* data[2];
  int64_t stride[2];  // of a row, in elements
  int64_t rows, n;
  const uint8_t* real[2];  // [n] of each view, masked elements counting as zero; both null: all are real
  const uint8_t* counted;  // [rows]; null: all count
};

// The loops of one comparison of two views.
template <typename A>
struct ScoreLoops {
  // Rows that have seen no key yet.
  void (*start_rows)(RunningRows<A>* rows);
  // Adds one more tile of raw scores. They are lost unless add_values follows.
  void (*add_tile)(const LaneGroup<A>& group, RunningRows<A>* rows);
  // After the last tile: the statistics, with an inverse of 0 where `alive` [2][kLanes] is 0 (null: all alive). Returns
  // the sum of the comparison over the rows, as far as it is known.
  A (*finish_rows)(const A* alive, const RunningRows<A>& rows, LaneStats<A>* stats);
  // Null, or a second sweep, for what takes the softmax of the whole row: returns the sum of a tile of raw scores and
  // adds to the statistics.
  A (*add_values)(const LaneGroup<A>& group, LaneStats<A>* stats);
  // Raw scores of both views become their gradients, times `gradient`, the upstream one. Those of the second view may
  // be anything where they are not `wanted`.
  void (*gradient_tile)(const LaneGroup<A>& group, const LaneStats<A>& stats, A gradient, bool wanted);
};

constexpr int kComparisons = 4;

// The loops of one comparison of rows of maps that exist, [rows, n] of each view, n padded with zeros.
template <typename A>
struct MapLoops {
  // The sum over all entries.
  double (*value)(const A* p, const A* t, int64_t rows, int64_t n);
  // Its gradients times `gradient`, which lie like the maps. Either may be null.
  void (*gradients)(const A* p, const A* t, int64_t rows, int64_t n, A gradient, A* to, A* to_aug);
};

constexpr int kMapComparisons = 3;  // all but that of scores

template <typename A>
struct Kernels {
  // dst [padded rows, ld] = rows `index` of src (row stride in elements). A row whose `real` byte is 0 is zero, and so
  // is everything beyond (n, dim).
  void (*gather_rows)(const void* src, Kind kind, int64_t stride, const int32_t* index, const uint8_t* real, int64_t n,
                      int64_t padded_rows, int64_t dim, int64_t ld, A* dst);
  // The reverse: rows `index` of dst = src [n, ld].
  void (*scatter_rows)(const A* src, int64_t ld, int64_t n, int64_t dim, Kind kind, int64_t stride,
                       const int32_t* index, void* dst);
  // dst [cols, ld_dst] = src [rows, ld_src]^T; rows and cols padded.
  void (*transpose)(const A* src, int64_t ld_src, int64_t rows, int64_t cols, A* dst, int64_t ld_dst);
  // C [m, n] (+)= A [m, k] B [k, n]; n padded.
  void (*product)(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, A* c, int64_t ldc,
                  bool accumulate);
  ScoreLoops<A> compare[kComparisons];  // by Comparison

  MeanLoops<A> mean;

  // Attention between words, a view at a time, which takes the first place in the group. Row word[j] of `sums`, laid
  // out as the scores, is of the word of key j. Adds exp(score - max) of one more tile to them, under the largest score
  // so far: all `words` rows of what was summed before go to it. The scores are lost.
  void (*add_words)(const LaneGroup<A>& group, const int32_t* word, int64_t words, WordRows<A>* rows, A* sums);
  // Raw scores become exp(score - max), which `sums` also gets added, unless it is null.
  void (*word_exponentials)(const LaneGroup<A>& group, const int32_t* word, const A* max, A* sums);
  // Exponentials e become e (gradients[word] - d), the gradients laid out as the sums.
  void (*word_gradient)(const LaneGroup<A>& group, const int32_t* word, const A* gradients, const A* d);
  // d [kLanes] = factor [kLanes] times the sums over `words` rows of gradients * sums, both with rows `ld` apart.
  void (*word_dots)(const A* gradients, const A* sums, int64_t words, int64_t ld, const A* factor, A* d);
  // Row to[i] of dst += factor[i] * row i of src, for `rows` rows of n elements, n padded.
  void (*add_to_rows)(const A* src, int64_t rows, int64_t n, const int32_t* to, const A* factor, A* dst);
  // Row i of dst = factor[i] * row from[i] of src, likewise.
  void (*copy_from_rows)(const A* src, int64_t rows, int64_t n, const int32_t* from, const A* factor, A* dst);
  MapLoops<A> compare_maps[kMapComparisons];  // by Comparison

  // The sum of (a - b)^2 over all elements.
  double (*squared_difference)(const RowPairs& pairs);
  // grad [rows, n] of the first view = gradient (a - b), of the second = -gradient (a - b). Both are zero where their
  // view is masked and in rows that do not count. Either may be null.
  void (*difference_gradient)(const RowPairs& pairs, A gradient, void* grad, void* grad_aug);
  // total [n] += the sum of rows `index` of src (row stride in elements), in double, because a plain float32 sum over
  // many tokens loses more than the error rule allows.
  void (*add_rows)(const void* src, Kind kind, int64_t stride, const int32_t* index, int64_t rows, int64_t n,
                   double* total);
  // y [n] = exp(x), n padded.
  void (*exponentials)(const A* x, int64_t n, A* y);
  // dst [n] = factor * src [n], in elements of the kinds `to` and `from`. Of double, both are double.
  void (*scale_row)(const void* src, Kind from, A factor, int64_t n, void* dst, Kind to);
};

struct Isa {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  // Operands of products in bfloat16, as bits. Their right operands have rows in twos, [rows / 2, cols, 2]: a product
  // takes two elements of a sum at once. Here rows are a multiple of kLanes and cols one of 2 kLanes.
  // gather_bits is gather_rows without arithmetic.
  void (*gather_bits)(const uint16_t* src, int64_t stride, const int32_t* index, const uint8_t* real, int64_t n,
                      int64_t padded_rows, int64_t dim, int64_t ld, uint16_t* dst);
  // dst [cols, ld_dst] = src [rows, ld_src]^T.
  void (*transpose_bits)(const uint16_t* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* dst,
                         int64_t ld_dst);
  // dst [cols / 2, rows, 2] = the right operand of src [rows, ld_src]^T.
  void (*transpose_pairs)(const uint16_t* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* dst);
  // dst [rows / 2, cols, 2] = the right operand of src [rows, ld_src].
  void (*pair_rows)(const uint16_t* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* dst);
  // Rounds src [rows, ld_src] to the left operand [rows, cols], to the right one [rows / 2, cols, 2], or to both: null
  // is not asked for. cols: a multiple of kLanes.
  void (*round_to_bf16)(const float* src, int64_t ld_src, int64_t rows, int64_t cols, uint16_t* left, uint16_t* right);
  // Rows of dst, `stride` bytes apart, = row [bytes], or zeros where `real` is 0 (null: all real).
  void (*fill_rows)(const char* row, const uint8_t* real, int64_t rows, int64_t bytes, int64_t stride, char* dst);
};

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512;
#endif

template <typename A>
const Kernels<A>& kernels(const Isa& isa);
template <>
inline const Kernels<float>& kernels<float>(const Isa& isa) {
  return isa.f32;
}
template <>
inline const Kernels<double>& kernels<double>(const Isa& isa) {
  return isa.f64;
}

}  // namespace ear_ops::cpu
