#include "../qk_launch.cuh"

template struct ear_ops::cuda::QKKernels<ear_ops::Comparison::kKl, ear_ops::cuda::float16, 96>;
template struct ear_ops::cuda::QKKernels<ear_ops::Comparison::kJs, ear_ops::cuda::float16, 96>;
template struct ear_ops::cuda::QKKernels<ear_ops::Comparison::kScores, ear_ops::cuda::float16, 96>;
