// The primitives of csrc/cuda/primitives.cuh on the host, for tests: the threads of a block run as fibers, one at a
// time.
//
// A warp runs until it needs another, so that nothing works by luck of timing: every warp up to the barrier of the
// block before the next warp starts, in an order that the seed decides. Copies into shared memory arrive as late as
// they may. Shared memory starts as NaN. Reported as errors: accesses outside of shared memory or of the tensors of a
// call, accesses that are not aligned, barriers and exchanges that not every thread reaches or that threads meet in
// different places. The matrix product is summed exactly, and then rounded towards zero. Hardware is a little less
// exact: it cuts the smaller addends off below the last places of the largest.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

#define EAR_OPS_DEVICE inline
#define EAR_OPS_KERNEL(threads, blocks) void
#define EAR_OPS_ARGUMENT
#define EAR_OPS_CONSTANT constexpr

namespace ear_ops::cuda {

namespace host {

// What the threads of a warp, or of a block, give each other at one point of the program.
enum class Meeting {
  kBlock,
  kWarp,
  kShuffle,
  kBallot,
  kLoadMatrices,
  kLoadMatricesTransposed,
  kMultiplyAdd,
  kPhase,
  kShareFactors
};

struct Exchange {  // of one lane
  const void* address = nullptr;
  uint32_t in[8] = {};
  uint32_t out[4] = {};
  uint32_t factors[kWarp][4] = {};  // of all lanes
  int type = 0;
};

int thread();
int64_t block();
char* shared();
Exchange& own();             // of the running thread
void meet(Meeting meeting);  // returns when everyone is there and the exchange is done
void check_shared(const void* address, int64_t bytes);
void check_global(const void* address, int64_t bytes);
void copy_later(void* shared, const void* global, int bytes, bool real);
void commit();
void wait(int groups);
float round_to_zero(double value);

struct Kernel {
  const void* function;  // by which it is known
  std::function<void()> body;
  const void* args;
  int64_t args_bytes;
};
const char* run(const Kernel& kernel, int64_t blocks, int threads, int64_t shared_bytes);
int64_t shared_limit();

}  // namespace host

inline int thread_index() { return host::thread(); }
inline int64_t block_index() { return host::block(); }
inline void sync_block() { host::meet(host::Meeting::kBlock); }
inline void sync_warp() { host::meet(host::Meeting::kWarp); }

inline uint32_t float_as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float bits_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float shuffle_xor(float value, int lanes) {
  auto& own = host::own();
  own.in[0] = float_as_bits(value), own.in[1] = static_cast<uint32_t>(lanes);
  host::meet(host::Meeting::kShuffle);
  return bits_as_float(own.out[0]);
}
inline uint32_t ballot(bool vote) {
  auto& own = host::own();
  own.in[0] = vote;
  host::meet(host::Meeting::kBallot);
  return own.out[0];
}
inline char* shared_memory() { return host::shared(); }

template <typename T>
inline T load_global(const T* from) {
  host::check_global(from, sizeof(T));
  return *from;
}
template <typename T>
inline void store_global(T* to, T value) {
  host::check_global(to, sizeof(T));
  *to = value;
}
template <typename T>
inline T load_shared(const void* from) {
  host::check_shared(from, sizeof(T));
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}
template <typename T>
inline void store_shared(void* to, T value) {
  host::check_shared(to, sizeof(T));
  std::memcpy(to, &value, sizeof(T));
}

template <int kBytes>
inline void copy_async(void* shared, const void* global, bool real) {
  host::check_shared(shared, kBytes);
  if (real) host::check_global(global, kBytes);
  host::copy_later(shared, global, kBytes, real);
}
inline void commit_copies() { host::commit(); }
template <int kGroups>
inline void wait_copies() {
  host::wait(kGroups);
}

template <bool kTranspose>
inline void load_matrices(uint32_t (&to)[4], const void* shared_row) {
  host::check_shared(shared_row, 16);
  auto& own = host::own();
  own.address = shared_row;
  host::meet(kTranspose ? host::Meeting::kLoadMatricesTransposed : host::Meeting::kLoadMatrices);
  std::memcpy(to, own.out, sizeof(to));
}

template <typename T>
inline void multiply_add(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto& own = host::own();
  own.type = std::is_same_v<T, bfloat16> ? 0 : 1;
  std::memcpy(own.in, a, sizeof(a));
  own.in[4] = b0, own.in[5] = b1;
  std::memcpy(own.out, c, sizeof(c));
  host::meet(host::Meeting::kMultiplyAdd);
  std::memcpy(c, own.out, sizeof(c));
}

inline int unknown(int x) { return x; }
inline float product(float a, float b) { return a * b; }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline float infinity() { return std::numeric_limits<float>::infinity(); }
inline float not_a_number() { return std::numeric_limits<float>::quiet_NaN(); }
using std::fabs;
using std::fmax;
using std::fmin;

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return bits_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(float16 x) {
  _Float16 half;
  std::memcpy(&half, &x, 2);
  return static_cast<float>(half);
}
inline void round_to(float from, float* to) { *to = from; }
inline void round_to(float from, bfloat16* to) {
  uint32_t bits = float_as_bits(from);
  if (from != from) {
    to->bits = 0x7fff;
    return;
  }
  bits += 0x7fff + (bits >> 16 & 1);
  to->bits = static_cast<uint16_t>(bits >> 16);
}
inline void round_to(float from, float16* to) {
  const _Float16 half = static_cast<_Float16>(from);
  std::memcpy(to, &half, 2);
}
template <typename T>
inline uint32_t pack_two(T, float first, float second) {
  T low, high;
  round_to(first, &low);
  round_to(second, &high);
  return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
}

inline int64_t shared_memory_limit() { return host::shared_limit(); }

template <typename Args>
const char* launch(void (*kernel)(Args), int64_t blocks, int threads, int64_t shared_bytes, void*, const Args& args) {
  if (const char* error = grid_error(blocks)) return error;
  if (shared_bytes > host::shared_limit()) return "too much shared memory was asked for";
  const host::Kernel run{reinterpret_cast<const void*>(kernel), [&]() { kernel(args); }, &args, sizeof(Args)};
  return host::run(run, blocks, threads, shared_bytes);
}

}  // namespace ear_ops::cuda
