// What the test bindings set before they start a kernel.
#pragma once

#include <cstdint>
#include <vector>

namespace ear_ops::cuda::host {

void allow(const void* data, int64_t bytes);    // memory that kernels may touch from now on
void spoil(void* data, int64_t bytes);          // fills memory that kernels must write with NaN
void spoil_scratch(void* data, int64_t bytes);  // the same, where every launch may write again
void forbid_all();
void set_shared_limit(int64_t bytes);  // of a block
void set_hopper(bool is_hopper);       // whether the device is one of sm_90
void set_seed(uint64_t seed);          // of the order in which threads and blocks run

// Runs a kernel in place of the fibers: its mangled name, grid, shared memory and arguments. Null, or what went wrong.
using Device = const char* (*)(const char* kernel, int64_t blocks, int threads, int64_t shared_bytes, const void* args,
                               int64_t args_bytes);
void set_device(Device device);  // null: the fibers

struct Memory {
  const char* data;
  int64_t bytes;
  int writes;  // by kernels: 0 none, 1 one of every byte, 2 one in every launch
};
const std::vector<Memory>& memory();  // that kernels may touch

}  // namespace ear_ops::cuda::host
