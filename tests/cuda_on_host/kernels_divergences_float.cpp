// The divergences of one element type; nvcc's files are C++ to the host compiler.
#include "../../csrc/cuda/instances/qk_divergences_float_128.cu"
#include "../../csrc/cuda/instances/qk_divergences_float_32.cu"
#include "../../csrc/cuda/instances/qk_divergences_float_64.cu"
#include "../../csrc/cuda/instances/qk_divergences_float_96.cu"
