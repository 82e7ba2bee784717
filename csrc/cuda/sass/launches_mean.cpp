// Prints what a call that compares averages over heads starts, as launches.cpp does. All slopes are one strip.
//
//     launches forward|gradients PAIRS HEADS LENGTH DIM plain|causal SHARED_MEMORY_OF_A_BLOCK
//
// Built with -DCOMPARISON=kMse -DELEMENT=bfloat16 -DFEATURES=64 and the object file of that instance.
#include "../mean_kernels.h"
#include "runtime.h"

using namespace ear_ops::cuda;

int main(int, char** words) {
  using Kernels = MeanKernels<ELEMENT, FEATURES>;
  constexpr auto kComparison = ear_ops::Comparison::COMPARISON;
  const bool with_gradients = !std::strcmp(words[1], "gradients");
  MeanArgs a{};
  a.slopes.planes = slope_planes(kComparison);
  for (QKArgs& view : a.view) {
    view.pairs = std::atoi(words[2]), view.heads = view.key_heads = std::atoi(words[3]);
    view.queries = view.keys = std::atoi(words[4]), view.dim = std::atoi(words[5]);
    view.scale = 0.125f, view.vectorized = true, view.is_causal = !std::strcmp(words[6], "causal");
    const int64_t rows = view.pairs * view.heads * view.queries, bytes = rows * view.dim * ELEMENT_BYTES;
    for (HeadsPointer* of : {&view.query[0], &view.key[0]}) {  // [B, L, H, D] in memory, as a projection gives it
      of->strides = {int64_t(view.queries) * view.heads * view.dim, view.dim, int64_t(view.heads) * view.dim, 1};
      of->data = memory<void>(of == &view.query[0] ? "query" : "key", bytes);
      if (with_gradients) of->gradient = memory<void>("gradient", bytes);
    }
    view.row_stats = memory<float>("row_stats", kMeanStats * rows * 4);
  }
  const QKArgs& view = a.view[0];
  shared_limit = std::atoi(words[7]);
  a.divisor[0] = a.divisor[1] = view.heads;
  a.key_parts = blocks_of(view.keys);
  a.slopes.rows = padded(view.queries), a.slopes.columns = padded(view.keys);
  a.slopes.data = memory<float>("slopes", slopes_size(a) * 4);
  a.block_sums = memory<float>("block_sums", view.pairs * blocks_of(view.queries) * a.key_parts * 4);

  const char* error = nullptr;
  const auto of_views = [&](auto* start) {
    argument_bytes = sizeof(MeanViewArgs);
    for (int v = 0; v < 2 && !error; ++v) error = start(MeanViewArgs{a.view[v], nullptr, a.slopes, v, 64.0f}, nullptr);
  };
  std::printf("{\"launches\": [\n");
  of_views(&Kernels::statistics);
  argument_bytes = sizeof(MeanArgs);
  if (!error) error = Kernels::average(kComparison, a, nullptr);
  if (with_gradients) {
    of_views(&Kernels::sums);
    of_views(&Kernels::query_gradient);
    of_views(&Kernels::key_gradient);
  }
  return print_regions(error);
}
