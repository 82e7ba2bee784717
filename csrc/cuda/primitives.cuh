// Everything that the kernels ask of the machine, and nothing else: the index of a thread, barriers, exchanges within a
// warp, copies into shared memory, matrix products, and every access to memory. Without nvcc, the same names come from
// a test-only implementation that runs the threads of a block as fibers on the host (tests/cuda_on_host/primitives.h).
#pragma once

#include <cstdint>

namespace ear_ops::cuda {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
struct alignas(16) SixteenBytes {  // what one access moves at most
  uint32_t words[4];
};

constexpr int kWarp = 32;

// Null, or why a grid cannot have so many blocks. CUDA would take the lowest 32 bits of a larger number without a word.
inline const char* grid_error(int64_t blocks) {
  return blocks < int64_t(1) << 31 ? nullptr : "it needs 2^31 or more blocks: split the batch into several calls";
}

}  // namespace ear_ops::cuda

#if !defined(__CUDACC__)
#include "primitives.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define EAR_OPS_DEVICE __device__ __forceinline__
// A multiprocessor must have room for `blocks`. Asked for no number, the compiler spills registers to fit more; asked
// for one, it takes all registers there are and may still end with too few.
#define EAR_OPS_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define EAR_OPS_ARGUMENT __grid_constant__
#define EAR_OPS_CONSTANT __host__ __device__ constexpr  // functions that the compiler works out

namespace ear_ops::cuda {

EAR_OPS_DEVICE int thread_index() { return threadIdx.x; }
EAR_OPS_DEVICE int64_t block_index() { return blockIdx.x; }
EAR_OPS_DEVICE void sync_block() { __syncthreads(); }
EAR_OPS_DEVICE void sync_warp() { __syncwarp(); }
EAR_OPS_DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }
EAR_OPS_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }

EAR_OPS_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char block_shared[];
  return block_shared;
}

template <typename T>
EAR_OPS_DEVICE T load_global(const T* from) {
  return *from;
}
template <typename T>
EAR_OPS_DEVICE void store_global(T* to, T value) {
  *to = value;
}
template <typename T>
EAR_OPS_DEVICE T load_shared(const void* from) {
  return *static_cast<const T*>(from);
}
template <typename T>
EAR_OPS_DEVICE void store_shared(void* to, T value) {
  *static_cast<T*>(to) = value;
}

// Starts to copy kBytes (4 or 16) from global to shared memory, or zeros where not `real`. They are there after
// wait_copies.
template <int kBytes>
EAR_OPS_DEVICE void copy_async(void* shared, const void* global, bool real) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = real ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}
EAR_OPS_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>  // returns when at most the last kGroups of this thread's groups are still on their way
EAR_OPS_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8.
template <bool kTranspose>
EAR_OPS_DEVICE void load_matrices(uint32_t (&to)[4], const void* shared_row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
  }
}

// c [16, 8] += a [16, 16] b [16, 8]
EAR_OPS_DEVICE void multiply_add(bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
EAR_OPS_DEVICE void multiply_add(float16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same number, of which the compiler knows nothing, so that it keeps nothing that follows from it in registers.
EAR_OPS_DEVICE int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
EAR_OPS_DEVICE uint32_t float_as_bits(float value) { return __float_as_uint(value); }
EAR_OPS_DEVICE float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }
EAR_OPS_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }  // never fused with what is added to it
EAR_OPS_DEVICE float exp2_fast(float x) {                                   // within 2 ulp
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
EAR_OPS_DEVICE float log2_fast(float x) {  // to an absolute error of 2^-22 near 1, to a relative one elsewhere
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
EAR_OPS_DEVICE float reciprocal_fast(float x) {  // within 1 ulp
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
EAR_OPS_DEVICE float infinity() { return __int_as_float(0x7f800000); }
EAR_OPS_DEVICE float not_a_number() { return __int_as_float(0x7fc00000); }

EAR_OPS_DEVICE float to_float(float x) { return x; }
EAR_OPS_DEVICE float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
EAR_OPS_DEVICE float to_float(float16 x) { return __half2float(__ushort_as_half(x.bits)); }
EAR_OPS_DEVICE void round_to(float from, float* to) { *to = from; }
EAR_OPS_DEVICE void round_to(float from, bfloat16* to) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(from)); }
EAR_OPS_DEVICE void round_to(float from, float16* to) { to->bits = __half_as_ushort(__float2half_rn(from)); }

// Rounds two numbers to 16 bits, the first in the lower half.
EAR_OPS_DEVICE uint32_t pack_two(bfloat16, float first, float second) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}
EAR_OPS_DEVICE uint32_t pack_two(float16, float first, float second) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
  return packed;
}

// --- on the host ---------------------------------------------------------------------------------------------------

inline int64_t shared_memory_limit() {  // bytes that one block may ask for
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Starts a kernel on a stream; null, or what went wrong.
template <typename Args>
const char* launch(void (*kernel)(Args), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
                   const Args& args) {
  if (blocks == 0) return nullptr;
  if (const char* error = grid_error(blocks)) return error;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  void* arguments[] = {const_cast<Args*>(&args)};
  if (error == cudaSuccess)
    error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)), dim3(threads),
                             arguments, shared_bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace ear_ops::cuda
#endif
