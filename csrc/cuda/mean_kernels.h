// The kernels of averages over heads for one element type and chunk of the head dimension: declared for
// mean_dispatch.cu, defined in mean_launch.cuh for the file in instances/ that compiles them.
#pragma once

#include "mean_args.h"

namespace ear_ops::cuda {

template <typename T, int kD>
struct MeanKernels {
  static const char* average(Comparison comparison, const MeanArgs& args, void* stream);
  static const char* statistics(const MeanViewArgs& args, void* stream);
  static const char* sums(const MeanViewArgs& args, void* stream);
  static const char* query_gradient(const MeanViewArgs& args, void* stream);
  static const char* key_gradient(const MeanViewArgs& args, void* stream);
};

}  // namespace ear_ops::cuda
