// The functions of primitives.cuh that convert numbers, so that a test can look at every bit of what they make.
#include "primitives.cuh"

namespace ear_ops::cuda {

struct Numbers {
  const float* from;  // [threads, 2]
  uint32_t* to;       // [threads, 6]
};

__global__ void convert(EAR_OPS_ARGUMENT const Numbers numbers) {
  const int thread = thread_index();
  const float first = numbers.from[2 * thread], second = numbers.from[2 * thread + 1];
  bfloat16 brain;
  float16 half;
  round_to(first, &brain);
  round_to(first, &half);
  const uint32_t converted[6] = {round_to_tf32(first),
                                 __float_as_uint(exp2_fast(first)),
                                 pack_two(bfloat16{}, first, second),
                                 pack_two(float16{}, first, second),
                                 brain.bits,
                                 half.bits};
  for (int i = 0; i < 6; ++i) numbers.to[6 * thread + i] = converted[i];
}

}  // namespace ear_ops::cuda
