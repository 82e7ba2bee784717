#include "../qk_launch.cuh"

template struct ear_ops::cuda::QKKernels<ear_ops::Comparison::kMse, ear_ops::cuda::bfloat16, 32>;
