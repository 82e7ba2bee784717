// Prints what the host code of the attention kernels would start, as JSON: which kernel, how many blocks, and the bytes
// of its arguments. The functions of the CUDA runtime that it calls are replaced here, so no GPU is needed.
//
//     launches forward|backward PAIRS HEADS LENGTH DIM plain|padded|causal SHARED_MEMORY_OF_A_BLOCK
//
// Built with -DCOMPARISON=kMse -DELEMENT=bfloat16 -DFEATURES=64 and the object file of that instance, or with -DHOPPER
// and that of the kernels for Hopper.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../qk_hopper.h"
#include "../qk_kernels.h"

namespace ear_ops::cuda {
struct bfloat16;
struct float16;
}  // namespace ear_ops::cuda

namespace {

const void* registered[64];
const char* names[64];
int registrations = 0, launches = 0, shared_limit = 0;

#if defined(HOPPER)
constexpr size_t kTensorMap = 128;  // bytes and alignment; four follow the arguments of the other kernels
constexpr size_t kArgumentBytes =
    (sizeof(ear_ops::cuda::QKArgs) + kTensorMap - 1) / kTensorMap * kTensorMap + 4 * kTensorMap;
int make_no_map() { return 0; }
#else
constexpr size_t kArgumentBytes = sizeof(ear_ops::cuda::QKArgs);
#endif

struct Dim3 {
  unsigned x, y, z;
};

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  registered[registrations] = host, names[registrations++] = name;
}
unsigned __cudaPushCallConfiguration(Dim3, Dim3, size_t, void*) { std::abort(); }
unsigned __cudaPopCallConfiguration(Dim3*, Dim3*, size_t*, void*) { std::abort(); }
int __cudaLaunchKernel(const void*, Dim3, Dim3, void**, size_t, void*) { std::abort(); }
int __cudaGetKernel(const void**, const void*) { std::abort(); }
const char* cudaGetErrorString(int) { return "no error"; }
int cudaGetDevice(int* device) { return *device = 0; }
int cudaDeviceGetAttribute(int* value, int which, int) {
  return *value = which == 75 ? 9 : which == 76 ? 0 : shared_limit, 0;  // compute capability 9.0
}
#if defined(HOPPER)
int cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long, int* found) {
  *function = reinterpret_cast<void*>(&make_no_map);
  return *found = 0;
}
#endif
int cudaFuncSetAttribute(const void*, int, int) { return 0; }

int cudaLaunchKernel(const void* host, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  int kernel = 0;
  while (registered[kernel] != host) ++kernel;
  std::printf("%s  {\"kernel\": \"%s\", \"blocks\": %u, \"threads\": %u, \"shared_bytes\": %zu, \"arguments\": \"",
              launches++ ? ",\n" : "", names[kernel], grid.x, block.x, shared);
  const auto* bytes = static_cast<const unsigned char*>(arguments[0]);
  for (size_t i = 0; i < kArgumentBytes; ++i) std::printf("%02x", bytes[i]);
  std::printf("\"}");
  return 0;
}

}  // extern "C"

namespace {

using namespace ear_ops::cuda;

std::string regions;
uint64_t next_address = uint64_t(1) << 32;

// The address of a tensor, with a gap before the next one.
template <typename T>
T* memory(const char* name, int64_t bytes, const char* content = "data") {
  regions += std::string(regions.empty() ? "" : ",\n") + "  {\"name\": \"" + name +
             "\", \"address\": " + std::to_string(next_address) + ", \"bytes\": " + std::to_string(bytes) +
             ", \"content\": \"" + content + "\"}";
  const uint64_t address = next_address;
  next_address += (bytes + (1 << 21)) >> 20 << 20;
  return reinterpret_cast<T*>(address);
}

}  // namespace

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
#if defined(HOPPER)
  const char* error = backward ? launch_hopper_backward(Element::kBFloat16, a, nullptr)
                               : launch_hopper_forward(Element::kBFloat16, a, nullptr);
#else
  using Kernels = QKKernels<ear_ops::Comparison::COMPARISON, ELEMENT, FEATURES>;
  const char* error = backward ? Kernels::backward(a, nullptr) : Kernels::forward(a, nullptr);
#endif
  std::printf("\n], \"regions\": [\n%s\n]}\n", regions.c_str());
  if (error) std::fprintf(stderr, "%s\n", error);
  return error != nullptr;
}
