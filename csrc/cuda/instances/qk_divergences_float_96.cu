#include "../qk_launch.cuh"

template struct ear_ops::cuda::QKKernels<ear_ops::Comparison::kKl, float, 96>;
template struct ear_ops::cuda::QKKernels<ear_ops::Comparison::kJs, float, 96>;
template struct ear_ops::cuda::QKKernels<ear_ops::Comparison::kScores, float, 96>;
