// What kernels for Hopper (sm_90a) ask of the machine beside primitives.cuh: barriers in shared memory, copies of tiles
// of a tensor (TMA), and matrix products of four warps that read shared memory (wgmma). Without nvcc, the same names
// come from tests/cuda_on_host/hopper.h.
//
// A tile lies in shared memory in rows of 128 bytes, from a multiple of 1024 bytes on. Of row r, the 16 bytes number c
// lie at place c ^ (r % 8) of the row, so that neither copies nor products meet bank conflicts.
#pragma once

#include "primitives.cuh"

namespace ear_ops::cuda {

constexpr int kTileRowBytes = 128;

// How a tensor [batch, head, row, feature] of 16-bit elements lies in memory. Strides are in bytes.
struct TensorShape {
  const void* data;
  uint64_t batches, heads, rows, features;
  uint64_t batch_stride, head_stride, row_stride;
};

// A tensor and the box that one copy takes of it. It must lie in the arguments of a kernel.
struct alignas(128) TensorMap {
  char bytes[128];
};

}  // namespace ear_ops::cuda

#if !defined(__CUDACC__)
#include "hopper.h"
#else

#include <cuda.h>

namespace ear_ops::cuda {

// Of shared memory, as products read it.
using Matrix = uint64_t;

EAR_OPS_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// A number that is the same in all lanes of a warp. The compiler learns that it is, and keeps it in a uniform register.
EAR_OPS_DEVICE int uniform(int number) { return __shfl_sync(0xffffffffu, number, 0); }

// The first multiple of 1024 bytes at or after a place in shared memory.
EAR_OPS_DEVICE char* align_tiles(char* shared) { return shared + (-shared_address(shared) & 1023u); }

// A barrier counts arrivals, and bytes that copies bring. A phase ends when all of both are there.
EAR_OPS_DEVICE void init_barrier(void* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Shows new barriers to copies. Other threads see them after a barrier of the block.
EAR_OPS_DEVICE void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
EAR_OPS_DEVICE void arrive(void* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and adds the bytes that the phase waits for.
EAR_OPS_DEVICE void arrive_expecting(void* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Returns when the phase of this parity has ended: 0 for the first, 1 for the second and for what was before the first.
EAR_OPS_DEVICE void wait_phase(void* barrier, int parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{.reg .pred ended; mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2; selp.b32 %0, 1, 0, ended;}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// Starts to copy a box, and zeros for what lies outside of the tensor. The barrier counts its bytes.
EAR_OPS_DEVICE void copy_box(void* shared, const TensorMap* map, int feature, int row, int head, int batch,
                             void* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(map), "r"(feature), "r"(row), "r"(head), "r"(batch), "r"(shared_address(barrier))
      : "memory");
}

// The rows from `shared` on, which is a multiple of 1024 bytes. One group of eight rows follows the other.
EAR_OPS_DEVICE Matrix matrix_at(const char* shared) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62, kGroupBytes = 8 * kTileRowBytes;
  return kSwizzle128 | kGroupBytes >> 4 << 32 | uint64_t(1) << 16 | (shared_address(shared) & 0x3ffffu) >> 4;
}
// The same rows, further on by some bytes.
EAR_OPS_DEVICE Matrix further(Matrix matrix, int bytes) { return matrix + (bytes >> 4); }

// Before the first product that takes registers which something else wrote.
EAR_OPS_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
EAR_OPS_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Returns when all products are done. Until then nobody may touch their sums.
template <int kViews, int kN>
EAR_OPS_DEVICE void wait_products(float (&sums)[kViews][kN][4]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int v = 0; v < kViews; ++v)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sums[v][n][e])::"memory");  // not read any earlier
}

#define EAR_OPS_PRODUCT(type)                                                                                       \
  asm volatile(                                                                                                     \
      "{.reg .pred adds; setp.ne.b32 adds, %34, 0;\n"                                                               \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                                   \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, adds, 1, 1, 0, 0;}"                                  \
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),    \
        "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),    \
        "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),    \
        "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),    \
        "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])                                                  \
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)))

// Starts c [64, 64] = a [64, 16] b [64, 16]^T, or adds it to c, for the four warps of a group: each holds 16 rows of c.
EAR_OPS_DEVICE void multiply_async(bfloat16, float (&c)[8][4], Matrix a, Matrix b, bool adds) {
  EAR_OPS_PRODUCT("bf16");
}
EAR_OPS_DEVICE void multiply_async(float16, float (&c)[8][4], Matrix a, Matrix b, bool adds) { EAR_OPS_PRODUCT("f16"); }

// --- on the host ---------------------------------------------------------------------------------------------------

inline bool is_hopper() {  // the current device
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 9 && minor == 0;
}

// A box holds `rows` rows of 64 features. Null, or what went wrong. The driver's function is asked for by name, so that
// nothing is linked against the driver.
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
inline const char* make_tensor_map(TensorMap* map, const TensorShape& of, uint32_t rows) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) !=
          cudaSuccess ||
      found != cudaDriverEntryPointSuccess)
    return "the driver has no cuTensorMapEncodeTiled";
  const cuuint64_t sizes[4] = {of.features, of.rows, of.heads, of.batches};
  const cuuint64_t strides[3] = {of.row_stride, of.head_stride, of.batch_stride};
  const cuuint32_t box[4] = {kTileRowBytes / 2, rows, 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(of.data), sizes,
      strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refuses the tensor map of an input";
}

}  // namespace ear_ops::cuda
#endif
