// Starts the qk_attention_mse kernels for Hopper. This file is compiled for sm_90a alone.
#include <cstdlib>
#include <cstring>

#include "qk_hopper_backward.cuh"

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

// Null, or what went wrong. Boxes of queries and keys hold so many rows.
const char* make_args(const QKArgs& a, int query_rows, int key_rows, HopperArgs* h) {
  h->args = a;
  for (int v = 0; v < 2; ++v) {
    if (const char* error = make_map(&h->query[v], a, a.query[v], a.heads, a.queries, query_rows)) return error;
    if (const char* error = make_map(&h->key[v], a, a.key[v], a.key_heads, a.keys, key_rows)) return error;
  }
  return nullptr;
}

template <typename T, int kD>
const char* launch_forward(const QKArgs& a, void* stream) {
  using R = ForwardRing<kD>;
  HopperArgs h;
  if (const char* error = make_args(a, R::kRows, kVisited, &h)) return error;
  const int64_t blocks = a.pairs * a.heads * ((a.queries + R::kRows - 1) / R::kRows);
  return launch(&forward_hopper<T, kD>, blocks, R::kThreads, R::kBytes, stream, h);
}

template <typename T, int kD, Role kOwner>
const char* launch_gradient(const QKArgs& a, void* stream) {
  using R = GradientRing<kD>;
  constexpr bool kQueries = kOwner == Role::kQueries;
  if (!(kQueries ? a.query : a.key)[0].gradient) return nullptr;  // both views or none
  HopperArgs h;
  if (const char* error = make_args(a, kQueries ? R::kRows : kVisited, kQueries ? kVisited : R::kRows, &h))
    return error;
  const int64_t blocks = ((kQueries ? a.queries : a.keys) + R::kRows - 1) / R::kRows;
  return launch(&gradient_hopper<T, kD, kOwner>, a.pairs * (kQueries ? a.heads : a.key_heads) * blocks,
                kGradientThreads, gradient_bytes<T, kD>(), stream, h);
}

template <typename T>
const char* launch_backward(const QKArgs& a, void* stream) {
  if (const char* error = launch_gradient<T, 64, Role::kQueries>(a, stream)) return error;
  return launch_gradient<T, 64, Role::kKeys>(a, stream);
}

}  // namespace

// One view alone is left to the other kernels.
bool hopper_takes_backward(Element element, const QKArgs& a) {
  const auto both = [](const HeadsPointer(&of)[2]) { return !of[0].gradient == !of[1].gradient; };
  return a.dim <= 64 && !a.key_mask && !a.counted_queries && both(a.query) && both(a.key) &&
         hopper_takes_forward(element, a);
}

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

const char* launch_hopper_backward(Element element, const QKArgs& a, void* stream) {
  return element == Element::kBFloat16 ? launch_backward<bfloat16>(a, stream) : launch_backward<float16>(a, stream);
}

}  // namespace ear_ops::cuda
