// The table of inner loops, compiled once for each instruction set. The includer sets the target, then defines
// EAR_OPS_ISA (the table's name) and EAR_OPS_ISA_NAME. vec.h says why this includes nothing from torch or the C++
// library. Entries are filled by name, in the order of kernels.h; one that is left out would be null.
#pragma once

#include "compare/js.h"
#include "compare/kl.h"
#include "compare/maps.h"
#include "compare/mse.h"
#include "compare/scores.h"
#include "kernels.h"
#include "mean_loops.h"
#include "pack_loops.h"
#include "row_loops.h"
#include "vec.h"
#include "word_loops.h"

namespace {

using ear_ops::cpu::Isa;
using ear_ops::cpu::Kernels;

template <typename A>
void exponentials(const A* x, int64_t n, A* y) {
  for (int64_t j = 0; j < n; j += Vec<A>::lanes) vstore<A>(y + j, vexp(vload<A>(x + j)));
}

template <typename A>
void scale_row(const void* src, Kind from, A factor, int64_t n, void* dst, Kind to) {
  with_storage<A>(from, [&]<typename From>() {
    with_storage<A>(to, [&]<typename To>() {
      const auto* x = static_cast<const From*>(src);
      auto* y = static_cast<To*>(dst);
      int64_t j = 0;
      for (; j + Vec<A>::lanes <= n; j += Vec<A>::lanes) vstore_as<A>(y + j, factor * vload_as<A>(x + j));
      for (; j < n; ++j) from_float(factor * to_float(x[j]), y[j]);
    });
  });
}

template <typename A>
constexpr Kernels<A> table() {
  return {
      .gather_rows = gather_rows<A>,
      .scatter_rows = scatter_rows<A>,
      .transpose = transpose<A>,
      .product = product<A>,
      .compare = {score_loops<Mse<A>>(), score_loops<Kl<A>>(), score_loops<Js<A>>(), score_loops<Scores<A>>()},
      .mean = mean_loops<A>(),
      .add_words = add_words<A>,
      .word_exponentials = word_exponentials<A>,
      .word_gradient = word_gradient<A>,
      .word_dots = word_dots<A>,
      .add_to_rows = add_to_rows<A>,
      .copy_from_rows = copy_from_rows<A>,
      .compare_maps = {map_loops<MapMse<A>>(), map_loops<MapKl<A>>(), map_loops<MapJs<A>>()},
      .squared_difference = squared_difference<A>,
      .difference_gradient = difference_gradient<A>,
      .add_rows = add_rows<A>,
      .exponentials = exponentials<A>,
      .scale_row = scale_row<A>,
  };
}

}  // namespace

namespace ear_ops::cpu {
extern const Isa EAR_OPS_ISA;
const Isa EAR_OPS_ISA = {
    .name = EAR_OPS_ISA_NAME,
    .f32 = table<float>(),
    .f64 = table<double>(),
    .gather_bits = gather_bits,
    .transpose_bits = transpose_bits,
    .transpose_pairs = transpose_pairs,
    .pair_rows = pair_rows,
    .round_to_bf16 = round_to_bf16,
    .fill_rows = fill_rows,
};
}  // namespace ear_ops::cpu
