// The primitives of csrc/cuda/hopper.cuh on the host, for tests. Copies of tiles arrive, and products are made, as late
// as they may. What they will overwrite holds NaN until then. A wait for a phase that never ends is reported.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ear_ops::cuda {

namespace host {

void init_barrier(void* barrier, int arrivals);
void arrive(void* barrier, int bytes);
void wait_phase(void* barrier, int parity);
void copy_box(void* shared, const TensorMap& map, const int (&corner)[4], void* barrier);
void start_product(int type, float (*sums)[4], const char* a, const char* b, bool adds);
void commit_products();
void finish_products();
bool is_hopper();

// What stands in the bytes of a tensor map; the interpreter of PTX reads it, too.
struct BoxedTensor {
  uint64_t data, sizes[4], strides[3], box_rows;  // features first; strides in bytes, of all but features
};
static_assert(sizeof(BoxedTensor) <= sizeof(TensorMap));

}  // namespace host

using Matrix = const char*;

inline int uniform(int number) { return number; }
inline char* align_tiles(char* shared) { return shared + (-reinterpret_cast<uintptr_t>(shared) & 1023); }
inline void init_barrier(void* barrier, int arrivals) { host::init_barrier(barrier, arrivals); }
inline void publish_barriers() {}
inline void arrive(void* barrier) { host::arrive(barrier, 0); }
inline void arrive_expecting(void* barrier, int bytes) { host::arrive(barrier, bytes); }
inline void wait_phase(void* barrier, int parity) { host::wait_phase(barrier, parity); }
inline void copy_box(void* shared, const TensorMap* map, int feature, int row, int head, int batch, void* barrier) {
  host::copy_box(shared, *map, {feature, row, head, batch}, barrier);
}

inline Matrix matrix_at(const char* shared) { return shared; }
inline Matrix further(Matrix matrix, int bytes) { return matrix + bytes; }
inline void begin_products() {}
inline void commit_products() { host::commit_products(); }
template <int kViews, int kN>
void wait_products(float (&)[kViews][kN][4]) {
  host::finish_products();
}
template <typename T>
void multiply_async(T, float (&sums)[8][4], Matrix a, Matrix b, bool adds) {
  host::start_product(std::is_same_v<T, bfloat16> ? 0 : 1, sums, a, b, adds);
}

inline bool is_hopper() { return host::is_hopper(); }
inline const char* make_tensor_map(TensorMap* map, const TensorShape& of, uint32_t rows) {
  const host::BoxedTensor tensor = {reinterpret_cast<uint64_t>(of.data),
                                    {of.features, of.rows, of.heads, of.batches},
                                    {of.row_stride, of.head_stride, of.batch_stride},
                                    rows};
  std::memset(map, 0, sizeof(*map));
  std::memcpy(map, &tensor, sizeof(tensor));
  return nullptr;
}

}  // namespace ear_ops::cuda
