// The qk_attention_mse kernels for Hopper: declared for qk_dispatch.cu, defined in qk_hopper.cu.
#pragma once

#include "qk_args.h"

namespace ear_ops::cuda {

// Queries that a block of the forward owns. What a warp adds up for wider vectors takes more registers.
constexpr int hopper_rows(int dim) { return dim <= 64 ? 192 : 128; }

// Whether they take the forward of a call. They must be asked for with EAR_OPS_CUDA_HOPPER=1.
bool hopper_takes_forward(Element element, const QKArgs& args);
const char* launch_hopper_forward(Element element, const QKArgs& args, void* stream);

}  // namespace ear_ops::cuda
