// The loops over rows of attention maps and hidden states, which are as fast as memory. kernels_impl.h includes this,
// so that it is compiled once for each instruction set.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using ear_ops::cpu::Kind;
using ear_ops::cpu::RowPairs;

// Calls body with the storage type of a tensor as its template argument. Float64 storage goes with float64 arithmetic.
template <typename A, typename Body>
void with_storage(Kind kind, const Body& body) {
  if constexpr (sizeof(A) == sizeof(double)) {
    body.template operator()<double>();
  } else if (kind == Kind::kBFloat16) {
    body.template operator()<Bf16>();
  } else if (kind == Kind::kFloat16) {
    body.template operator()<Half>();
  } else {
    body.template operator()<float>();
  }
}

template <typename T>
inline void prefetch(const T* row, int64_t n) {
  for (int64_t c = 0; c < n; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c);
}

// How many elements a loop over rows of n asks memory ahead. One core has few requests under way, so its bandwidth
// comes from asking early, also for what it will overwrite. Stores that go past the caches were slower, and they leave
// the gradient where its reader does not find it.
template <typename T>
inline int64_t elements_ahead(int64_t n, int64_t stride) {
  constexpr int64_t kAheadOfRows = 2048 / sizeof(T);
  return n >= kAheadOfRows ? kAheadOfRows : (kAheadOfRows + n - 1) / n * stride;
}

template <typename T>
inline void prefetch_to_write(T* row, int64_t n) {
  for (int64_t c = 0; c < n; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c, 1);
}

// Some rows of one tensor.
template <typename T>
struct Rows {
  T *data, *end;
  int64_t stride, ahead;

  Rows(T* data, int64_t rows, int64_t n, int64_t stride)
      : data(data), end(data + (rows - 1) * stride + n), stride(stride), ahead(elements_ahead<T>(n, stride)) {}
  T* row(int64_t i) const { return data + i * stride; }
};

// Both views are masked outside of the elements [begin, end) of a row; begin is a multiple of a vector.
template <typename A>
inline void real_range(const RowPairs& p, int64_t& begin, int64_t& end) {
  constexpr int64_t W = Vec<A>::lanes;
  begin = 0, end = p.n;
  if (!p.real[0]) return;
  while (end > 0 && !p.real[0][end - 1] && !p.real[1][end - 1]) --end;
  while (begin < end && !p.real[0][begin] && !p.real[1][begin]) ++begin;
  begin = begin / W * W;
  end = (end + W - 1) / W * W < p.n ? (end + W - 1) / W * W : p.n;
}

// Rows without masks that lie one after the other are one long row.
inline RowPairs flattened(RowPairs p) {
  if (!p.real[0] && !p.counted && p.stride[0] == p.n && p.stride[1] == p.n) {
    p.n *= p.rows, p.rows = 1;
    p.stride[0] = p.stride[1] = p.n;
  }
  return p;
}

// a - b for a vector of elements from j on, where masked elements are zero.
template <typename A, bool kMasked, typename T>
inline typename Vec<A>::type difference_of(const RowPairs& p, const T* a, const T* b, int64_t j) {
  const typename Vec<A>::type zero{};
  const auto x = vload_as<A>(a + j), y = vload_as<A>(b + j);
  if constexpr (!kMasked) return x - y;
  return (vmask<A>(p.real[0] + j) ? x : zero) - (vmask<A>(p.real[1] + j) ? y : zero);
}

template <typename A, bool kMasked, typename T>
inline A difference_of_one(const RowPairs& p, const T* a, const T* b, int64_t j) {
  return (!kMasked || p.real[0][j] ? to_float(a[j]) : A(0)) - (!kMasked || p.real[1][j] ? to_float(b[j]) : A(0));
}

constexpr int64_t kUnrolled = 4;  // vectors of a step of the loops over rows

template <typename A, bool kMasked, typename T>
double squared_difference_of(const RowPairs& p, const T* a, const T* b) {
  constexpr int64_t W = Vec<A>::lanes, kStep = kUnrolled * W, kSegment = 1024;  // elements summed in one go
  using V = typename Vec<A>::type;
  const Rows<const T> first(a, p.rows, p.n, p.stride[0]), second(b, p.rows, p.n, p.stride[1]);
  int64_t begin, end;
  real_range<A>(p, begin, end);
  double total[W] = {}, rest = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (p.counted && !p.counted[i]) continue;
    const T *x = first.row(i), *y = second.row(i);
    int64_t j = begin;
    for (; j + W <= end;) {
      const int64_t segment = j + kSegment < end ? j + kSegment : end;
      V sums[kUnrolled] = {};
      for (; j + kStep <= segment; j += kStep) {
        if (x + j + first.ahead < first.end) prefetch(x + j + first.ahead, kStep);
        if (y + j + second.ahead < second.end) prefetch(y + j + second.ahead, kStep);
        for (int64_t u = 0; u < kUnrolled; ++u) {
          const V difference = difference_of<A, kMasked>(p, x, y, j + u * W);
          sums[u] += difference * difference;
        }
      }
      for (; j + W <= segment; j += W) {
        const V difference = difference_of<A, kMasked>(p, x, y, j);
        sums[0] += difference * difference;
      }
      add_to(total, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    for (; j < end; ++j) {
      const A difference = difference_of_one<A, kMasked>(p, x, y, j);
      rest += difference * difference;
    }
  }
  for (int64_t l = 0; l < W; ++l) rest += total[l];
  return rest;
}

template <typename A>
double squared_difference(const RowPairs& pairs) {
  const RowPairs p = flattened(pairs);
  double sum = 0;
  with_storage<A>(p.kind, [&]<typename T>() {
    const auto* a = static_cast<const T*>(p.data[0]);
    const auto* b = static_cast<const T*>(p.data[1]);
    sum = p.real[0] ? squared_difference_of<A, true>(p, a, b) : squared_difference_of<A, false>(p, a, b);
  });
  return sum;
}

template <typename A, bool kMasked, typename T>
inline void put(const RowPairs& p, int view, T* to, int64_t j, typename Vec<A>::type v) {
  if constexpr (kMasked) v = vmask<A>(p.real[view] + j) ? v : typename Vec<A>::type{};
  vstore_as<A>(to + j, v);
}

// A gradient that is not asked for is never written through its pointer.
template <typename A, bool kMasked, bool kFirst, bool kSecond, typename T>
void difference_gradient_of(const RowPairs& p, A gradient, const T* a, const T* b, T* grad, T* grad_aug) {
  constexpr int64_t W = Vec<A>::lanes, kStep = kUnrolled * W;
  const Rows<const T> first(a, p.rows, p.n, p.stride[0]), second(b, p.rows, p.n, p.stride[1]);
  const Rows<T> to_first(grad, p.rows, p.n, p.n), to_second(grad_aug, p.rows, p.n, p.n);
  int64_t begin, end;
  real_range<A>(p, begin, end);
  for (int64_t i = 0; i < p.rows; ++i) {
    const T *x = first.row(i), *y = second.row(i);
    T *to_x = to_first.row(i), *to_y = to_second.row(i);
    const bool counts = !p.counted || p.counted[i];
    const int64_t from = counts ? begin : 0, until = counts ? end : 0;
    auto zero = [&](int64_t k, int64_t last) {
      for (; k + kStep <= last; k += kStep) {
        if (kFirst && to_x + k + to_first.ahead < to_first.end) prefetch_to_write(to_x + k + to_first.ahead, kStep);
        if (kSecond && to_y + k + to_second.ahead < to_second.end) prefetch_to_write(to_y + k + to_second.ahead, kStep);
        for (int64_t u = 0; u < kUnrolled; ++u) {
          if constexpr (kFirst) vstore_as<A>(to_x + k + u * W, typename Vec<A>::type{});
          if constexpr (kSecond) vstore_as<A>(to_y + k + u * W, typename Vec<A>::type{});
        }
      }
      for (; k < last; ++k) {
        if constexpr (kFirst) from_float(A(0), to_x[k]);
        if constexpr (kSecond) from_float(A(0), to_y[k]);
      }
    };
    zero(0, from);
    int64_t j = from;
    for (; j + kStep <= until; j += kStep) {
      if (x + j + first.ahead < first.end) prefetch(x + j + first.ahead, kStep);
      if (y + j + second.ahead < second.end) prefetch(y + j + second.ahead, kStep);
      if (kFirst && to_x + j + to_first.ahead < to_first.end) prefetch_to_write(to_x + j + to_first.ahead, kStep);
      if (kSecond && to_y + j + to_second.ahead < to_second.end) prefetch_to_write(to_y + j + to_second.ahead, kStep);
      for (int64_t u = 0; u < kUnrolled; ++u) {
        const auto difference = gradient * difference_of<A, kMasked>(p, x, y, j + u * W);
        if constexpr (kFirst) put<A, kMasked>(p, 0, to_x, j + u * W, difference);
        if constexpr (kSecond) put<A, kMasked>(p, 1, to_y, j + u * W, -difference);
      }
    }
    for (; j + W <= until; j += W) {
      const auto difference = gradient * difference_of<A, kMasked>(p, x, y, j);
      if constexpr (kFirst) put<A, kMasked>(p, 0, to_x, j, difference);
      if constexpr (kSecond) put<A, kMasked>(p, 1, to_y, j, -difference);
    }
    for (; j < until; ++j) {
      const A difference = gradient * difference_of_one<A, kMasked>(p, x, y, j);
      if constexpr (kFirst) from_float(!kMasked || p.real[0][j] ? difference : A(0), to_x[j]);
      if constexpr (kSecond) from_float(!kMasked || p.real[1][j] ? -difference : A(0), to_y[j]);
    }
    zero(until, p.n);
  }
}

template <typename A, bool kMasked, typename T>
void difference_gradient_to(const RowPairs& p, A gradient, const T* a, const T* b, T* grad, T* grad_aug) {
  if (grad && grad_aug) return difference_gradient_of<A, kMasked, true, true>(p, gradient, a, b, grad, grad_aug);
  if (grad) return difference_gradient_of<A, kMasked, true, false>(p, gradient, a, b, grad, grad);
  if (grad_aug) return difference_gradient_of<A, kMasked, false, true>(p, gradient, a, b, grad_aug, grad_aug);
}

template <typename A>
void difference_gradient(const RowPairs& pairs, A gradient, void* grad, void* grad_aug) {
  const RowPairs p = flattened(pairs);
  with_storage<A>(p.kind, [&]<typename T>() {
    const auto* a = static_cast<const T*>(p.data[0]);
    const auto* b = static_cast<const T*>(p.data[1]);
    auto* to = static_cast<T*>(grad);
    auto* to_aug = static_cast<T*>(grad_aug);
    if (p.real[0]) {
      difference_gradient_to<A, true>(p, gradient, a, b, to, to_aug);
    } else {
      difference_gradient_to<A, false>(p, gradient, a, b, to, to_aug);
    }
  });
}

template <typename A, typename T>
void add_rows_of(const T* base, int64_t stride, const int32_t* index, int64_t rows, int64_t n, double* total) {
  constexpr int64_t W = Vec<A>::lanes, kTogether = 8;  // rows summed in A before they join the total
  int64_t r = 0;
  for (; r + kTogether <= rows; r += kTogether) {
    const T *from[kTogether], *next[kTogether];
    for (int64_t g = 0; g < kTogether; ++g) {
      from[g] = base + index[r + g] * stride;
      next[g] = r + kTogether + g < rows ? base + index[r + kTogether + g] * stride : from[g];
    }
    int64_t j = 0;
    for (; j + W <= n; j += W) {
      typename Vec<A>::type sum[kTogether];
      for (int64_t g = 0; g < kTogether; ++g) {
        __builtin_prefetch(next[g] + j);
        sum[g] = vload_as<A>(from[g] + j);
      }
      for (int64_t half = kTogether / 2; half > 0; half /= 2)
        for (int64_t g = 0; g < half; ++g) sum[g] += sum[g + half];
      add_to(total + j, sum[0]);
    }
    for (; j < n; ++j)
      for (int64_t g = 0; g < kTogether; ++g) total[j] += to_float(from[g][j]);
  }
  for (; r < rows; ++r) {
    const T* from = base + index[r] * stride;
    int64_t j = 0;
    for (; j + W <= n; j += W) add_to(total + j, vload_as<A>(from + j));
    for (; j < n; ++j) total[j] += to_float(from[j]);
  }
}

template <typename A>
void add_rows(const void* src, Kind kind, int64_t stride, const int32_t* index, int64_t rows, int64_t n,
              double* total) {
  with_storage<A>(kind,
                  [&]<typename T>() { add_rows_of<A>(static_cast<const T*>(src), stride, index, rows, n, total); });
}

void fill_rows(const char* row, const uint8_t* real, int64_t rows, int64_t bytes, int64_t stride, char* dst) {
  const Rows<char> to(dst, rows, bytes, stride);
  for (int64_t i = 0; i < rows; ++i) {
    char* at = to.row(i);
    const bool zero = real && !real[i];
    for (int64_t j = 0; j < bytes; j += 64) {
      if (at + j + to.ahead < to.end) prefetch_to_write(at + j + to.ahead, 64);
      const int64_t n = bytes - j < 64 ? bytes - j : 64;
      if (zero) {
        memset(at + j, 0, n);
      } else if (n == 64) {
        memcpy(at + j, row + j, 64);  // of a size that the compiler knows: moves of vectors
      } else {
        memcpy(at + j, row + j, n);
      }
    }
  }
}

}  // namespace
