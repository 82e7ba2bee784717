// Starts the qk_attention_mse kernels for Hopper. This file is compiled for sm_90a alone.
#include <cstdlib>
#include <cstring>

#include "qk_hopper.cuh"

namespace ear_ops::cuda {

namespace {

bool is_asked_for() {
  const char* asked = std::getenv("EAR_OPS_CUDA_HOPPER");
  return asked && !std::strcmp(asked, "1") && is_hopper();
}

// Whether a tensor map can describe the strides. A dimension of size 1 has none.
bool has_strides(const HeadsPointer& of, int64_t batches, int heads, int rows) {
  const int64_t sizes[3] = {batches, heads, rows};
  const int64_t strides[3] = {of.strides.batch, of.strides.head, of.strides.row};
  for (int i = 0; i < 3; ++i)
    if (sizes[i] > 1 && (strides[i] <= 0 || strides[i] >= int64_t(1) << 39)) return false;
  return true;
}

const char* make_map(TensorMap* map, const QKArgs& a, const HeadsPointer& of, int heads, int rows, int box_rows) {
  const auto bytes = [](int64_t size, int64_t stride) { return static_cast<uint64_t>(size > 1 ? 2 * stride : 16); };
  const TensorShape shape = {of.data,
                             static_cast<uint64_t>(a.pairs),
                             static_cast<uint64_t>(heads),
                             static_cast<uint64_t>(rows),
                             static_cast<uint64_t>(a.dim),
                             bytes(a.pairs, of.strides.batch),
                             bytes(heads, of.strides.head),
                             bytes(rows, of.strides.row)};
  return make_tensor_map(map, shape, box_rows);
}

template <typename T, int kD>
const char* launch_forward(const QKArgs& a, void* stream) {
  HopperArgs h{a, {}, {}};
  for (int v = 0; v < 2; ++v) {
    if (const char* error = make_map(&h.query[v], a, a.query[v], a.heads, a.queries, Ring<kD>::kRows)) return error;
    if (const char* error = make_map(&h.key[v], a, a.key[v], a.key_heads, a.keys, kVisited)) return error;
  }
  const int64_t blocks = a.pairs * a.heads * ((a.queries + Ring<kD>::kRows - 1) / Ring<kD>::kRows);
  return launch(&forward_hopper<T, kD>, blocks, Ring<kD>::kThreads, Ring<kD>::kBytes, stream, h);
}

}  // namespace

bool hopper_takes_forward(Element element, const QKArgs& a) {
  if (element == Element::kFloat32 || a.is_causal || a.window || a.bias[0].data || a.bias[1].data) return false;
  const bool fits = (a.dim > 32 && a.dim <= 64) || (a.dim > 96 && a.dim <= 128);
  if (!fits || !a.vectorized || a.keys <= 128 || a.queries == 0 || a.pairs == 0 || a.heads == 0) return false;
  for (int v = 0; v < 2; ++v)
    if (!has_strides(a.query[v], a.pairs, a.heads, a.queries) || !has_strides(a.key[v], a.pairs, a.key_heads, a.keys))
      return false;
  return is_asked_for();
}

const char* launch_hopper_forward(Element element, const QKArgs& a, void* stream) {
  if (element == Element::kBFloat16)
    return a.dim <= 64 ? launch_forward<bfloat16, 64>(a, stream) : launch_forward<bfloat16, 128>(a, stream);
  return a.dim <= 64 ? launch_forward<float16, 64>(a, stream) : launch_forward<float16, 128>(a, stream);
}

}  // namespace ear_ops::cuda
