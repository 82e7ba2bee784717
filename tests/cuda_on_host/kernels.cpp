// What does not depend on the element type; nvcc's files are C++ to the host compiler.
#include "../../csrc/cuda/attention_mse.cu"
#include "../../csrc/cuda/mean_dispatch.cu"
#include "../../csrc/cuda/pooled_distance.cu"
#include "../../csrc/cuda/qk_dispatch.cu"
