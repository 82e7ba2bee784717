// What this machine can do at best. Benchmarks hold the kernels against these rates.
#include <torch/library.h>

#include <chrono>

#include "isa.h"
#include "products.h"
#include "schedule.h"
#include "scratch.h"
#include "tensors.h"

namespace ear_ops::cpu {

namespace {

// Calls of body(thread) per second and thread, all threads at once, the best of 20 tries.
template <typename Body>
double best_rate(int64_t threads, const Body& body) {
  constexpr int64_t kCalls = 64;
  double best = 0;
  for (int attempt = 0; attempt <= 20; ++attempt) {  // the first one warms up
    const auto start = std::chrono::steady_clock::now();
    parallel_for(threads, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; ++thread)
        for (int64_t call = 0; call < kCalls; ++call) body(thread);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (attempt > 0) best = std::max(best, kCalls / seconds.count());
  }
  return best;
}

template <typename P>
std::vector<double> rates(int64_t m, int64_t n, int64_t k) {
  using A = typename P::Accumulator;
  using Operand = typename P::Operand;
  const P products(selection());
  const auto& table = kernels<A>(*selection().isa);
  const int64_t threads = at::get_num_threads();
  auto carve = [&](Arena& arena) {
    return std::make_tuple(arena.take<Operand>(m * k), arena.take<Operand>(k * n), arena.take<A>(m * n),
                           arena.take<A>(m * n));
  };
  Arena measure(nullptr);
  carve(measure);
  const Scratch scratch(threads, measure.used());
  for (int64_t thread = 0; thread < threads; ++thread) {
    Arena arena = scratch.of(thread);
    const auto [left, right, in, out] = carve(arena);
    std::fill_n(left, m * k, Operand(0)), std::fill_n(right, k * n, Operand(0)), std::fill_n(in, m * n, A(0));
    std::fill_n(out, m * n, A(0));
  }
  const double product = best_rate(threads, [&](int64_t thread) {
    Arena arena = scratch.of(thread);
    const auto [left, right, in, out] = carve(arena);
    products.multiply(m, n, k, left, k, right, n, out, n, false);
  });
  parallel_for(threads, [&](int64_t, int64_t) { products.release(); });  // each thread holds its own
  const double exponential = best_rate(threads, [&](int64_t thread) {
    Arena arena = scratch.of(thread);
    const auto [left, right, in, out] = carve(arena);
    table.exponentials(in, m * n, out);
  });
  return {product * threads * 2.0 * m * n * k, exponential * threads * m * n};
}

// Multiplications and additions per second of an [m, k] x [k, n] product, and exponentials per second, on all threads.
std::vector<double> cpu_rates(int64_t m, int64_t n, int64_t k, at::ScalarType dtype) {
  for (const int64_t size : {m, n, k})
    TORCH_CHECK_VALUE(size > 0 && size % 32 == 0, "cpu_rates: m, n, k: expected multiples of 32, got ", size);
  return with_products(kind_of(dtype), [&]<typename P>() { return rates<P>(m, n, k); });
}

// What products of inputs of this dtype are computed in, and by what.
std::string cpu_products(at::ScalarType dtype) {
  return with_products(kind_of(dtype), []<typename P>() { return std::string(P(selection()).name()); });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ear_ops, m) {
  m.def("cpu_rates(int m, int n, int k, ScalarType dtype) -> float[]", &cpu_rates);
  m.def("cpu_products(ScalarType dtype) -> str", &cpu_products);
}

}  // namespace ear_ops::cpu
