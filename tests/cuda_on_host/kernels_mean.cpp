// The averages over heads, of all element types; nvcc's files are C++ to the host compiler.
#include "../../csrc/cuda/instances/mean_bfloat16_32.cu"
#include "../../csrc/cuda/instances/mean_bfloat16_64.cu"
#include "../../csrc/cuda/instances/mean_float_32.cu"
#include "../../csrc/cuda/instances/mean_float_64.cu"
