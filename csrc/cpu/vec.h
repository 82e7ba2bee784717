// Vectors in GCC's and Clang's portable vector extension: one source for every instruction set. The includer says how
// many bytes a register holds, because compilers take wider vectors apart through memory. Files that use this header
// are compiled several times for different instruction sets, where a shared inline function could end up as the AVX-512
// copy for everyone. So everything has internal linkage, and nothing from torch or the C++ library is included.
#pragma once

#if !defined(__GNUC__)  // which Clang defines, too
#error the CPU kernels need GCC or Clang, whose vector extension they are written in
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined(EAR_OPS_VECTOR_BYTES)
#define EAR_OPS_VECTOR_BYTES 16
#endif

namespace {

constexpr int kFloats = EAR_OPS_VECTOR_BYTES / 4, kDoubles = EAR_OPS_VECTOR_BYTES / 8;  // in a register

// A vector of so many bytes.
#define EAR_OPS_VECTOR(type, bytes) typedef type __attribute__((vector_size(bytes)))
EAR_OPS_VECTOR(float, 4 * kFloats) f32v;
EAR_OPS_VECTOR(int32_t, 4 * kFloats) i32v;
EAR_OPS_VECTOR(uint32_t, 4 * kFloats) u32v;
EAR_OPS_VECTOR(uint16_t, 2 * kFloats) u16v;
EAR_OPS_VECTOR(uint8_t, kFloats) u8v;
EAR_OPS_VECTOR(double, 8 * kDoubles) f64v;
EAR_OPS_VECTOR(int64_t, 8 * kDoubles) i64v;
EAR_OPS_VECTOR(float, 4 * kDoubles) f32_of_f64v;  // as many elements as a vector of doubles
EAR_OPS_VECTOR(uint32_t, 4 * kDoubles) u32_of_f64v;
EAR_OPS_VECTOR(uint16_t, 2 * kDoubles) u16_of_f64v;
EAR_OPS_VECTOR(uint8_t, kDoubles) u8_of_f64v;
EAR_OPS_VECTOR(float, 32) f32x8;
EAR_OPS_VECTOR(int16_t, 16) i16x8;
#undef EAR_OPS_VECTOR

template <typename A>
struct Vec;

template <>
struct Vec<float> {
  typedef f32v type;
  typedef i32v mask;  // what comparisons give
  typedef u8v bytes;  // as many bytes
  static constexpr int64_t lanes = kFloats;
};

template <>
struct Vec<double> {
  typedef f64v type;
  typedef i64v mask;
  typedef u8_of_f64v bytes;
  static constexpr int64_t lanes = kDoubles;
};

template <typename A>
static inline typename Vec<A>::type vload(const A* from) {
  typename Vec<A>::type v;
  memcpy(&v, from, sizeof(v));
  return v;
}

template <typename A>
static inline void vstore(A* to, typename Vec<A>::type v) {
  memcpy(to, &v, sizeof(v));
}

template <typename A>
static inline typename Vec<A>::type vset(A x) {
  return x - typename Vec<A>::type{};
}

// `product` as it is when rounded. Without this the compiler may fuse a product with the sum that it goes into, and the
// same product would then differ from one place to another. Clang fuses within one expression alone. GCC has
// __builtin_assoc_barrier, but takes AVX-512 vectors apart for it.
template <typename V>
static inline V rounded(V product) {
#if defined(__clang__)
  return product;
#elif defined(__x86_64__)
  asm("" : "+v"(product));
  return product;
#elif defined(__aarch64__)
  asm("" : "+w"(product));
  return product;
#else
  asm("" : "+m"(product));
  return product;
#endif
}

// May lose a NaN in a or b; the exponential that follows brings it back.
template <typename A>
static inline typename Vec<A>::type vmax(typename Vec<A>::type a, typename Vec<A>::type b) {
  return a > b ? a : b;
}

// exp for arguments up to 88, within 1 ulp: 2^n times a polynomial on [-ln2/2, ln2/2], whose relative error of 3e-9 is
// the least of its degree. NaN stays NaN, and what would be below the smallest normal number is 0.
static inline f32v vexp(f32v x) {
  const float magic = 12582912.0f + 127;  // 1.5 * 2^23 rounds to an integer in the low bits; 127 makes it an exponent
  f32v shifted = x * 1.44269504088896341f + magic;
  f32v n = shifted - magic;
  f32v r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  f32v p = r * 1.3814540078e-3f + 8.3687452128e-3f;
  p = p * r + 4.1668390793e-2f;
  p = p * r + 1.6666520398e-1f;
  p = p * r + 4.9999993432e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  f32v result = p * (f32v)((i32v)shifted << 23);  // a cast between vectors keeps the bits
  return x < -87.33654f ? f32v{} : result;
}

static inline f64v vexp(f64v x) {
  f64v result;
  for (int i = 0; i < kDoubles; ++i) result[i] = exp(x[i]);
  return result;
}

// log(1 + x) for x above -1, within 2 ulp; digits of small x are kept. 1 + x = 2^n m with m near 1; the polynomial is
// the one of Cephes' logf. NaN stays NaN.
static inline f32v vlog1p(f32v x) {
  const f32v y = 1 + x;
  const i32v n = ((i32v)y - 0x3f3504f3) >> 23;  // m in [sqrt(1/2), sqrt(2))
  const f32v m = (f32v)((i32v)y - (n << 23)), power = __builtin_convertvector(n, f32v);
  const f32v r = n == 0 ? x : m - 1, square = r * r;
  f32v p = r * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  p = p * r * square - power * 2.12194440e-4f - square * 0.5f;
  const f32v result = r + p + power * 0.693359375f;
  return x != x ? x : result;
}

static inline f64v vlog1p(f64v x) {
  f64v result;
  for (int i = 0; i < kDoubles; ++i) result[i] = log1p(x[i]);
  return result;
}

// The same for x from 0 to 1, in half the time, within 2 ulp: x times a polynomial of x - 1/2 for log(1 + x) / x, whose
// relative error of 5e-9 is the least of its degree.
static inline f32v vlog1p_to_1(f32v x) {
  const f32v s = x - 0.5f;
  f32v p = s * -3.243980929e-3f + 5.253348965e-3f;
  p = p * s - 6.749936379e-3f;
  p = p * s + 1.157615148e-2f;
  p = p * s - 2.057029121e-2f;
  p = p * s + 3.663547337e-2f;
  p = p * s - 6.768769771e-2f;
  p = p * s + 1.326090097e-1f;
  p = p * s - 2.885271013e-1f;
  p = p * s + 8.109301925e-1f;
  return p * x;
}

static inline f64v vlog1p_to_1(f64v x) { return vlog1p(x); }

static inline float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

static inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// The storage types of tensors. Each 16-bit one is a type of its own, so that templates tell them apart.
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline double to_float(double x) { return x; }
static inline float to_float(Bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
static inline float to_float(Half x) {
  uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  float value = bits_to_float(magnitude) * 0x1p112f;  // moves the exponent, denormals included
  uint32_t bits = float_to_bits(value);
  bits = magnitude >= (0x7c00u << 13) ? (bits | 0x7f800000u) : bits;  // infinity and NaN
  return bits_to_float(bits | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

static inline void from_float(float x, float& to) { to = x; }
static inline void from_float(double x, double& to) { to = x; }
static inline void from_float(float x, Bf16& to) {  // round to nearest even
  uint32_t bits = float_to_bits(x);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}
static inline void from_float(float x, Half& to) {  // round to nearest even
  uint32_t bits = float_to_bits(x);
  uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias and round. Denormal ones: adding 0.5 lets the float unit round at the right bit.
  uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t denormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;  // 65536 and more; 65520..65535 round up to it by themselves
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = static_cast<uint16_t>(sign | half);
}

// Loads a vector of a tensor's elements in the arithmetic type, and stores it back, rounded to nearest even.
template <typename A>
static inline typename Vec<A>::type vload_as(const A* from) {
  return vload<A>(from);
}

template <typename A>
static inline f32v vload_as(const Bf16* from) {
  u16v bits;
  memcpy(&bits, from, sizeof(bits));
  return (f32v)(__builtin_convertvector(bits, u32v) << 16);
}

#if defined(EAR_OPS_F16C)
template <typename A>
static inline f32v vload_as(const Half* from) {
  f32v result;
  for (int i = 0; i < kFloats; i += 8) {
    i16x8 half;
    memcpy(&half, from + i, sizeof(half));
    const f32x8 wide = __builtin_ia32_vcvtph2ps256(half);
    memcpy(reinterpret_cast<float*>(&result) + i, &wide, sizeof(wide));
  }
  return result;
}
#else
template <typename A>
static inline f32v vload_as(const Half* from) {  // as to_float
  u16v half;
  memcpy(&half, from, sizeof(half));
  const u32v wide = __builtin_convertvector(half, u32v);
  const u32v magnitude = (wide & 0x7fffu) << 13;
  u32v bits = (u32v)((f32v)magnitude * 0x1p112f);
  bits = magnitude >= (0x7c00u << 13) ? (bits | 0x7f800000u) : bits;
  return (f32v)(bits | ((wide & 0x8000u) << 16));
}
#endif

template <typename A>
static inline void vstore_as(A* to, typename Vec<A>::type v) {
  vstore<A>(to, v);
}

static inline void vstore_bits(void* to, u32v bits) {  // the lower half of each
  const u16v narrow = __builtin_convertvector(bits, u16v);
  memcpy(to, &narrow, sizeof(narrow));
}

// The bits of bfloat16 numbers, as from_float rounds them.
static inline u32v bf16_bits(f32v v) {
  const u32v bits = (u32v)v, nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v != v ? u32v{} + 0x7fc0u : nearest;
}

template <typename A>
static inline void vstore_as(Bf16* to, f32v v) {
  vstore_bits(to, bf16_bits(v));
}

#if defined(EAR_OPS_F16C)
template <typename A>
static inline void vstore_as(Half* to, f32v v) {
  for (int i = 0; i < kFloats; i += 8) {
    f32x8 wide;
    memcpy(&wide, reinterpret_cast<const float*>(&v) + i, sizeof(wide));
    const i16x8 half = __builtin_ia32_vcvtps2ph256(wide, 0);  // to nearest even
    memcpy(to + i, &half, sizeof(half));
  }
}
#else
template <typename A>
static inline void vstore_as(Half* to, f32v v) {  // as from_float
  const u32v bits = (u32v)v, magnitude = bits & 0x7fffffffu;
  const u32v normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const u32v denormal = (u32v)((f32v)magnitude + 0.5f) - 0x3f000000u;
  u32v half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x47800000u ? u32v{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? u32v{} + 0x7e00u : half;
  vstore_bits(to, ((bits >> 16) & 0x8000u) | half);
}
#endif

// Makes bytes as wide as the lanes, step by step: in one step the compiler would take the vector apart.
static inline i32v widen(u8v bytes) { return __builtin_convertvector(__builtin_convertvector(bytes, u16v), i32v); }
static inline i64v widen(u8_of_f64v bytes) {
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, u16_of_f64v), u32_of_f64v),
                                 i64v);
}

// The lanes whose byte is not 0.
template <typename A>
static inline typename Vec<A>::mask vmask(const uint8_t* from) {
  typename Vec<A>::bytes bytes;
  memcpy(&bytes, from, sizeof(bytes));
  return widen(bytes) != 0;
}

// total [lanes] += v.
static inline void add_to(double* total, f64v v) { vstore<double>(total, vload<double>(total) + v); }
static inline void add_to(double* total, f32v v) {
  f32_of_f64v half[2];
  memcpy(half, &v, sizeof(v));
  for (int i = 0; i < 2; ++i) add_to(total + kDoubles * i, __builtin_convertvector(half[i], f64v));
}

}  // namespace
