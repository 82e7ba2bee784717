// Compares the masked means of two views of hidden states [B, L, C] in one pass over them.
//
//   memory    real tokens of x, real tokens of x^a
//               | summed, eight tokens at a time
//   scratch   total [1024] of each view, float64
//               | divided by the tokens, subtracted
//   memory    difference [B, C]; its square, summed over the slices in order: sums [B]
//
//   backward  difference [B, C], times 2 g / tokens --> one row [1024] in scratch --> every real token, zeros elsewhere
//
// A slice is 1024 features of one sequence, so that a single long sequence is shared out among threads too.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <numeric>

#include "../register.h"
#include "isa.h"
#include "schedule.h"
#include "tensors.h"

namespace ear_ops::cpu {

namespace {

constexpr const char* kOp = "pooled_distance";
constexpr int64_t kFeatures = 1024;  // of a slice

// The memory of a checked problem.
struct Hidden : PooledSizes {
  std::array<Tensor, 2> views;
  OptionalTensor mask;

  Hidden(const PooledProblem& problem, const PooledSizes& sizes)
      : PooledSizes(sizes),
        views(dense_views(problem.hidden, problem.hidden_aug, sizes.pairs)),
        mask(contiguous(problem.mask)) {}

  const char* sequence(int view, int64_t b) const {
    const Tensor& t = views[view];
    return static_cast<const char*>(t.data_ptr()) + b * t.stride(0) * t.element_size();
  }
  int64_t count(int view, int64_t b) const {  // of real tokens
    const uint8_t* real = mask_row(mask, view * pairs + b);
    return real ? length - std::count(real, real + length, uint8_t(0)) : length;
  }
  int64_t slices() const { return (features + kFeatures - 1) / kFeatures; }
};

// Calls body(task, b, first feature, features) for every sequence and every slice of its features.
template <typename Body>
void for_slices(const Hidden& h, const Body& body) {
  const int64_t slices = h.slices(), tasks = h.pairs * slices;
  run_tasks(tasks, workers_for(static_cast<double>(h.views[0].numel())), [&](int64_t, const auto& next) {
    for (int64_t task = next(); task < tasks; task = next()) {
      const int64_t first = task % slices * kFeatures;
      body(task, task / slices, first, std::min(kFeatures, h.features - first));
    }
  });
}

template <typename A>
void forward(const Hidden& h, Tensor& sums, Tensor& difference) {
  const auto& table = kernels<A>(*selection().isa);
  const Kind kind = kind_of(h.views[0]);
  const int64_t element = h.views[0].element_size();
  A* means = difference.data_ptr<A>();
  const int64_t slices = h.slices();
  std::vector<double> slice_sums(h.pairs * slices);
  for_slices(h, [&](int64_t task, int64_t b, int64_t first, int64_t n) {
    double total[2][kFeatures] = {};
    double count[2];
    std::vector<int32_t> tokens(h.length);
    for (int v = 0; v < 2; ++v) {
      const uint8_t* real = mask_row(h.mask, v * h.pairs + b);
      int64_t found = 0;
      for (int64_t i = 0; i < h.length; ++i)
        if (!real || real[i]) tokens[found++] = static_cast<int32_t>(i);
      table.add_rows(h.sequence(v, b) + first * element, kind, h.views[v].stride(1), tokens.data(), found, n, total[v]);
      count[v] = static_cast<double>(std::max<int64_t>(found, 1));
    }
    for (int64_t c = 0; c < n; ++c) {
      const double mean_difference = total[0][c] / count[0] - total[1][c] / count[1];
      slice_sums[task] += mean_difference * mean_difference;
      means[b * h.features + first + c] = static_cast<A>(mean_difference);
    }
  });
  A* sum = sums.data_ptr<A>();
  for (int64_t b = 0; b < h.pairs; ++b)
    sum[b] =
        static_cast<A>(std::accumulate(slice_sums.begin() + b * slices, slice_sums.begin() + (b + 1) * slices, 0.0));
}

// Every real token of a sequence has the same gradient: it is converted once and copied.
template <typename A>
void backward(const Hidden& h, const Tensor& grad_sums, const Tensor& difference, const std::array<Tensor, 2>& out) {
  const Isa& isa = *selection().isa;
  const auto& table = kernels<A>(isa);
  const A* upstream = grad_sums.data_ptr<A>();
  const A* means = difference.data_ptr<A>();
  constexpr Kind kSums = sizeof(A) == sizeof(double) ? Kind::kFloat64 : Kind::kFloat32;
  const Kind kind = kind_of(h.views[0]);
  const int64_t element = h.views[0].element_size();
  for_slices(h, [&](int64_t, int64_t b, int64_t first, int64_t n) {
    alignas(64) char row[kFeatures * sizeof(double)];
    for (int v = 0; v < 2; ++v) {
      if (!out[v].defined()) continue;
      const A count = static_cast<A>(std::max<int64_t>(h.count(v, b), 1));
      table.scale_row(means + b * h.features + first, kSums, (v == 0 ? 2 : -2) * upstream[b] / count, n, row, kind);
      char* to = static_cast<char*>(out[v].data_ptr()) + (b * h.length * h.features + first) * element;
      isa.fill_rows(row, mask_row(h.mask, v * h.pairs + b), h.length, n * element, h.features * element, to);
    }
  });
}

std::tuple<Tensor, Tensor> pooled_distance(const PooledProblem& problem) {
  const Hidden hidden(problem, check(kOp, problem, kLimits));
  const auto options = problem.hidden.options().dtype(accumulator_of(problem.hidden));
  Tensor sums = at::empty({hidden.pairs}, options), difference = at::empty({hidden.pairs, hidden.features}, options);
  with_accumulator(problem.hidden, [&]<typename A>() { forward<A>(hidden, sums, difference); });
  return {sums, difference};
}

std::vector<Tensor> pooled_distance_backward(const Tensor& grad_sums, const PooledProblem& problem,
                                             const Tensor& difference, const c10::List<bool>& needs) {
  const Hidden hidden(problem, check_backward(kOp, problem, kLimits, grad_sums, difference, needs));
  Gradients gradients = make_gradients({{problem.hidden, problem.hidden_aug}}, needs, hidden.pairs,
                                       [](const Tensor& like) { return at::empty(like.sizes(), like.options()); });
  const auto dtype = accumulator_of(problem.hidden);
  const Tensor upstream = grad_sums.to(dtype).contiguous(), means = difference.to(dtype).contiguous();
  with_accumulator(problem.hidden, [&]<typename A>() { backward<A>(hidden, upstream, means, gradients.views[0]); });
  return gradients.returned;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ear_ops, m) {
  register_operator<&pooled_distance, &pooled_distance_backward>(m, kOp, c10::DispatchKey::CPU);
}

}  // namespace ear_ops::cpu
