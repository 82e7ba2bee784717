// The kernels for Hopper; nvcc's files are C++ to the host compiler.
#include "../../csrc/cuda/qk_hopper.cu"
