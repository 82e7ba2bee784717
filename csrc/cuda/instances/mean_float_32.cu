#include "../mean_launch.cuh"

template struct ear_ops::cuda::MeanKernels<float, 32>;
