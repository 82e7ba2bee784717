#include "../qk_launch.cuh"

template struct ear_ops::cuda::QKKernels<float, 64>;
