// The divergences of one element type; nvcc's files are C++ to the host compiler.
#include "../../csrc/cuda/instances/qk_divergences_float16_128.cu"
#include "../../csrc/cuda/instances/qk_divergences_float16_32.cu"
#include "../../csrc/cuda/instances/qk_divergences_float16_64.cu"
#include "../../csrc/cuda/instances/qk_divergences_float16_96.cu"
