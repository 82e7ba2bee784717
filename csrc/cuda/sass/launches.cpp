// Prints what the host code of the attention kernels would start, as JSON: which kernel, how many blocks, and the bytes
// of its arguments.
//
//     launches forward|backward PAIRS HEADS LENGTH DIM plain|padded|causal SHARED_MEMORY_OF_A_BLOCK
//
// Built with -DCOMPARISON=kMse -DELEMENT=bfloat16 -DFEATURES=64 and the object file of that instance, or with -DHOPPER
// and that of the kernels for Hopper.
#include "../qk_hopper.h"
#include "../qk_kernels.h"
#include "runtime.h"

using namespace ear_ops::cuda;

int main(int, char** words) {
  const bool backward = !std::strcmp(words[1], "backward");
  const std::string kind = words[6];
  QKArgs a{};
  a.pairs = std::atoi(words[2]), a.heads = a.key_heads = std::atoi(words[3]);
  a.queries = a.keys = std::atoi(words[4]), a.dim = std::atoi(words[5]);
  a.scale = 0.125f, a.vectorized = true, a.is_causal = kind == "causal";
  shared_limit = std::atoi(words[7]);
  const int64_t rows = a.pairs * a.heads * a.queries, bytes = rows * a.dim * ELEMENT_BYTES;
  for (int view = 0; view < 2; ++view)
    for (HeadsPointer* of : {&a.query[view], &a.key[view]}) {
      // [B, L, H, D] in memory, as a projection gives it
      of->strides = {int64_t(a.queries) * a.heads * a.dim, a.dim, int64_t(a.heads) * a.dim, 1};
      of->data = memory<void>(of == &a.query[view] ? "query" : "key", bytes);
      if (backward) of->gradient = memory<void>("gradient", bytes);
    }
  if (kind == "padded") {
    a.key_mask = memory<uint8_t>("key_mask", 2 * a.pairs * a.keys, "ones");
    a.counted_queries = memory<uint8_t>("counted_queries", a.pairs * a.queries, "ones");
  }
  a.row_stats = memory<float>("row_stats", kRowStats * rows * 4);
  if (backward) a.grad_sums = memory<float>("grad_sums", a.pairs * a.heads * 4);
  if (!backward) {
#if defined(HOPPER)
    const int rows_of_a_block = kHopperRows;
#else
    const int rows_of_a_block = QKKernels<ear_ops::Comparison::COMPARISON, ELEMENT, FEATURES>::rows_of_a_block(a);
#endif
    const int64_t blocks = (a.queries + rows_of_a_block - 1) / rows_of_a_block;
    a.block_sums = memory<float>("block_sums", a.pairs * a.heads * blocks * 4);
  }
  std::printf("{\"launches\": [\n");
  argument_bytes = sizeof(QKArgs);
#if defined(HOPPER)
  constexpr size_t kTensorMap = 128;  // bytes and alignment; four follow the arguments of the other kernels
  argument_bytes = (sizeof(QKArgs) + kTensorMap - 1) / kTensorMap * kTensorMap + 4 * kTensorMap;
  const char* error = backward ? launch_hopper_backward(Element::kBFloat16, a, nullptr)
                               : launch_hopper_forward(Element::kBFloat16, a, nullptr);
#else
  using Kernels = QKKernels<ear_ops::Comparison::COMPARISON, ELEMENT, FEATURES>;
  const char* error = backward ? Kernels::backward(a, nullptr) : Kernels::forward(a, nullptr);
#endif
  return print_regions(error);
}
