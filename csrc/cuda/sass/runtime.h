// The functions of the CUDA runtime that the host code of the kernels calls, replaced by ones that print what would
// start. No GPU is needed. The includer sets argument_bytes before kernels start.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace ear_ops::cuda {
struct bfloat16;
struct float16;
}  // namespace ear_ops::cuda

namespace {

const void* registered[64];
const char* names[64];
int registrations = 0, launches = 0, shared_limit = 0;

size_t argument_bytes = 0;  // of the kernels that start next
int make_no_map() { return 0; }

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
int cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long, int* found) {
  *function = reinterpret_cast<void*>(&make_no_map);
  return *found = 0;
}
int cudaFuncSetAttribute(const void*, int, int) { return 0; }

int cudaLaunchKernel(const void* host, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  int kernel = 0;
  while (registered[kernel] != host) ++kernel;
  std::printf("%s  {\"kernel\": \"%s\", \"blocks\": %u, \"threads\": %u, \"shared_bytes\": %zu, \"arguments\": \"",
              launches++ ? ",\n" : "", names[kernel], grid.x, block.x, shared);
  const auto* bytes = static_cast<const unsigned char*>(arguments[0]);
  for (size_t i = 0; i < argument_bytes; ++i) std::printf("%02x", bytes[i]);
  std::printf("\"}");
  return 0;
}

}  // extern "C"

namespace {

std::string regions;
uint64_t next_address = uint64_t(1) << 32;

// The address of a tensor, with a gap before the next one. Its content is "data", "ones", or 0, 1, ... up to a period.
template <typename T>
T* memory(const char* name, int64_t bytes, const char* content = "data", int period = 0) {
  regions += std::string(regions.empty() ? "" : ",\n") + "  {\"name\": \"" + name +
             "\", \"address\": " + std::to_string(next_address) + ", \"bytes\": " + std::to_string(bytes) +
             ", \"content\": \"" + content + "\", \"period\": " + std::to_string(period) + "}";
  const uint64_t address = next_address;
  next_address += (bytes + (1 << 21)) >> 20 << 20;
  return reinterpret_cast<T*>(address);
}

int print_regions(const char* error) {
  std::printf("\n], \"regions\": [\n%s\n]}\n", regions.c_str());
  if (error) std::fprintf(stderr, "%s\n", error);
  return error != nullptr;
}

}  // namespace
