#include "../mean_launch.cuh"

template struct ear_ops::cuda::MeanKernels<ear_ops::cuda::float16, 32>;
