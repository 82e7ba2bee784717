// The qk_attention_mse kernels for Hopper: declared for qk_dispatch.cu, defined in qk_hopper.cu.
#pragma once

#include "qk_args.h"

namespace ear_ops::cuda {

constexpr int kHopperRows = 192;          // queries that a block of the forward owns
constexpr int kHopperGradientRows = 128;  // queries or keys that a block of the backward owns

// Whether they take a call. They must be asked for with EAR_OPS_CUDA_HOPPER=1.
bool hopper_takes_forward(Element element, const QKArgs& args);
bool hopper_takes_backward(Element element, const QKArgs& args);
const char* launch_hopper_forward(Element element, const QKArgs& args, void* stream);
const char* launch_hopper_backward(Element element, const QKArgs& args, void* stream);

}  // namespace ear_ops::cuda
