// Attention between words; nvcc's files are C++ to the host compiler.
#include "../../csrc/cuda/qk_words.cu"
