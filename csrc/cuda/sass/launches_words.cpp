// Prints what a call that compares attention between words starts, as launches.cpp does. Every token but the first is a
// word of its own.
//
//     launches forward|backward PAIRS HEADS LENGTH DIM plain SHARED_MEMORY_OF_A_BLOCK
//
// Built with -DCOMPARISON=kMse -DELEMENT=bfloat16 and the object file of qk_words.cu.
#include "../qk_words_args.h"
#include "runtime.h"

using namespace ear_ops::cuda;

namespace {

Element element_of(float*) { return Element::kFloat32; }
Element element_of(bfloat16*) { return Element::kBFloat16; }
Element element_of(float16*) { return Element::kFloat16; }

}  // namespace

int main(int, char** words) {
  const bool backward = !std::strcmp(words[1], "backward");
  WordArgs a{};
  a.pairs = std::atoi(words[2]), a.heads = a.key_heads = std::atoi(words[3]);
  a.queries = a.keys = std::atoi(words[4]), a.dim = std::atoi(words[5]);
  a.scale = 0.125f, a.vectorized = true;
  a.comparison = ear_ops::Comparison::COMPARISON, a.numbers = a.queries;
  shared_limit = std::atoi(words[7]);
  const int64_t rows = a.pairs * a.heads * a.queries, bytes = rows * a.dim * ELEMENT_BYTES;
  for (int view = 0; view < 2; ++view)
    for (HeadsPointer* of : {&a.query[view], &a.key[view]}) {  // [B, L, H, D] in memory, as a projection gives it
      of->strides = {int64_t(a.queries) * a.heads * a.dim, a.dim, int64_t(a.heads) * a.dim, 1};
      of->data = memory<void>(of == &a.query[view] ? "query" : "key", bytes);
      if (backward) of->gradient = memory<void>("gradient", bytes);
    }
  const int64_t tokens = 2 * a.pairs * a.queries;
  a.position = memory<int>("position", tokens * 4, "count", a.queries);
  a.number = memory<int>("number", tokens * 4, "count", a.queries);
  a.first = memory<int>("first", 2 * a.pairs * (a.numbers + 1) * 4, "count", a.numbers + 1);
  a.row_stats = memory<float>("row_stats", 4 * rows * 4);
  a.block_sums = memory<float>("block_sums", a.pairs * a.heads * strip_blocks(a) * 4);
  if (backward) a.grad_sums = memory<float>("grad_sums", a.pairs * a.heads * 4), a.d = memory<float>("d", 2 * rows * 4);

  argument_bytes = sizeof(WordArgs);
  std::printf("{\"launches\": [\n");
  const Element element = element_of(static_cast<ELEMENT*>(nullptr));
  return print_regions(backward ? launch_words_backward(element, a, nullptr)
                                : launch_words_forward(element, a, nullptr));
}
