// The functions of primitives.cuh that convert and copy, so that a test can look at every bit of what they make.
#include "primitives.cuh"

namespace ear_ops::cuda {

struct Numbers {
  const float* from;  // [threads, 4]
  uint32_t* to;       // [threads, 5] of a copy, [threads, 7] of conversions
};

__global__ void convert(EAR_OPS_ARGUMENT const Numbers numbers) {
  const int thread = thread_index();
  const float first = numbers.from[4 * thread], second = numbers.from[4 * thread + 1];
  bfloat16 brain;
  float16 half;
  round_to(first, &brain);
  round_to(first, &half);
  const uint32_t converted[7] = {float_as_bits(exp2_fast(first)),
                                 pack_two(bfloat16{}, first, second),
                                 pack_two(float16{}, first, second),
                                 brain.bits,
                                 half.bits,
                                 float_as_bits(log2_fast(fabsf(first))),
                                 float_as_bits(reciprocal_fast(first))};
  for (int i = 0; i < 7; ++i) numbers.to[7 * thread + i] = converted[i];
}

// Copies the four numbers of a thread at once and its first number alone; those of odd threads are not real.
__global__ void copy(EAR_OPS_ARGUMENT const Numbers numbers) {
  const int thread = thread_index();
  const float* from = numbers.from + 4 * thread;
  char* four = shared_memory() + 32 * thread;
  char* first = four + 16;
  const bool real = thread % 2 == 0;
  copy_async<16>(four, from, real);
  commit_copies();
  wait_copies<0>();
  copy_async<4>(first, from, real);
  commit_copies();
  wait_copies<0>();
  for (int i = 0; i < 5; ++i) numbers.to[5 * thread + i] = load_shared<uint32_t>(four + 4 * i);
}

}  // namespace ear_ops::cuda
