// What the test bindings set before they start a kernel.
#pragma once

#include <cstdint>

namespace ear_ops::cuda::host {

void allow(const void* data, int64_t bytes);  // memory that kernels may touch from now on
void forbid_all();
void set_shared_limit(int64_t bytes);  // of a block
void set_seed(uint64_t seed);          // of the order in which threads and blocks run

}  // namespace ear_ops::cuda::host
