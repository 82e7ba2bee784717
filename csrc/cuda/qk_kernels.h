// The kernels of one comparison, element type and chunk of the head dimension: declared for qk_dispatch.cu,
// defined in qk_launch.cuh for the file in instances/ that compiles them.
#pragma once

#include "qk_args.h"

namespace ear_ops::cuda {

template <Comparison kComparison, typename T, int kD>
struct QKKernels {
  static int64_t shared_bytes(const QKArgs& args);  // that the kernels for rows of any length ask of a block
  static int rows_of_a_block(const QKArgs& args);   // queries that a block of the forward owns
  static const char* forward(const QKArgs& args, void* stream);
  static const char* backward(const QKArgs& args, void* stream);
};

}  // namespace ear_ops::cuda
