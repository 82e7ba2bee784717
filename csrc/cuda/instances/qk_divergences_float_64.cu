#include "../qk_launch.cuh"

template struct ear_ops::cuda::QKKernels<ear_ops::Comparison::kKl, float, 64>;
template struct ear_ops::cuda::QKKernels<ear_ops::Comparison::kJs, float, 64>;
template struct ear_ops::cuda::QKKernels<ear_ops::Comparison::kScores, float, 64>;
