// Squared distance between the masked means of two views: one pass over the hidden states, the means in scratch.
#include <ATen/ops/empty.h>

#include <numeric>

#include "isa.h"
#include "schedule.h"
#include "views.h"

namespace ear_ops {

namespace cpu {
namespace {

constexpr const char* kOp = "pooled_distance";

struct Hidden {
  int64_t pairs, length, features;
  std::array<Tensor, 2> views;
  OptionalTensor mask;
  Kind kind;

  const char* sequence(int view, int64_t b) const {
    const Tensor& t = views[view];
    return static_cast<const char*>(t.data_ptr()) + b * t.stride(0) * t.element_size();
  }
  int64_t count(int view, int64_t b) const {  // of real tokens
    const uint8_t* real = mask_row(mask, view * pairs + b);
    return real ? length - std::count(real, real + length, uint8_t(0)) : length;
  }
};

Hidden make_hidden(const Tensor& hidden, const OptionalTensor& hidden_aug, const OptionalTensor& mask) {
  check_dim(kOp, "hidden", hidden, 3, "[B, L, C]");
  Hidden h;
  h.pairs = pairs_of(kOp, "hidden", hidden, !hidden_aug.has_value());
  h.length = hidden.size(1), h.features = hidden.size(2);
  TORCH_CHECK_VALUE(h.length < (int64_t(1) << 31), kOp, ": hidden: the sequences are too long");
  check_optional(kOp, "hidden_aug", hidden_aug, hidden.sizes(), hidden.scalar_type());
  check_optional(kOp, "mask", mask, {2 * h.pairs, h.length}, at::kBool);
  h.views = split_views(hidden, hidden_aug, h.pairs);
  h.mask = dense(mask);
  h.kind = kind_of(kOp, hidden);
  return h;
}

constexpr int64_t kFeatures = 1024;  // of a task: a single long sequence is shared out too

int64_t slices_of(const Hidden& h) { return (h.features + kFeatures - 1) / kFeatures; }

// body(task, b, first feature, features) for every sequence and every slice of its features.
template <typename Body>
void for_slices(const Hidden& h, const Body& body) {
  const int64_t slices = slices_of(h), tasks = h.pairs * slices;
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
  const int64_t element = h.views[0].element_size();
  A* means = difference.data_ptr<A>();
  const int64_t slices = slices_of(h);
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
      table.add_rows(h.sequence(v, b) + first * element, h.kind, h.views[v].stride(1), tokens.data(), found, n,
                     total[v]);
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
  const int64_t element = h.views[0].element_size();
  for_slices(h, [&](int64_t, int64_t b, int64_t first, int64_t n) {
    alignas(64) char row[kFeatures * sizeof(double)];
    for (int v = 0; v < 2; ++v) {
      if (!out[v].defined()) continue;
      const A count = static_cast<A>(std::max<int64_t>(h.count(v, b), 1));
      table.scale_row(means + b * h.features + first, (v == 0 ? 2 : -2) * upstream[b] / count, n, h.kind, row);
      char* to = static_cast<char*>(out[v].data_ptr()) + (b * h.length * h.features + first) * element;
      isa.fill_rows(row, mask_row(h.mask, v * h.pairs + b), h.length, n * element, h.features * element, to);
    }
  });
}

}  // namespace
}  // namespace cpu

std::tuple<Tensor, Tensor> pooled_distance(const Tensor& hidden, const OptionalTensor& hidden_aug,
                                           const OptionalTensor& mask) {
  const auto h = cpu::make_hidden(hidden, hidden_aug, mask);
  const auto options = hidden.options().dtype(cpu::accumulator_of(hidden));
  Tensor sums = at::empty({h.pairs}, options), difference = at::empty({h.pairs, h.features}, options);
  if (h.kind == cpu::Kind::kFloat64) {
    cpu::forward<double>(h, sums, difference);
  } else {
    cpu::forward<float>(h, sums, difference);
  }
  return {sums, difference};
}

std::vector<Tensor> pooled_distance_backward(const Tensor& grad_sums, const Tensor& hidden,
                                             const OptionalTensor& hidden_aug, const OptionalTensor& mask,
                                             const Tensor& difference, const c10::List<bool>& needs) {
  const auto h = cpu::make_hidden(hidden, hidden_aug, mask);
  check_shape(cpu::kOp, "grad_sums", grad_sums, {h.pairs});
  check_shape(cpu::kOp, "difference", difference, {h.pairs, h.features});
  TORCH_CHECK_VALUE(needs.size() == 2, cpu::kOp, ": needs: expected 2 entries, got ", needs.size());
  std::vector<Tensor> gradients;
  std::array<Tensor, 2> out;
  if (needs.get(0)) {
    gradients.push_back(at::empty(hidden.sizes(), hidden.options()));
    out[0] = gradients.back();
    if (!hidden_aug) out[1] = gradients.back().narrow(0, h.pairs, h.pairs);
  }
  if (needs.get(1) && hidden_aug) {
    gradients.push_back(at::empty(hidden.sizes(), hidden.options()));
    out[1] = gradients.back();
  }
  const auto dtype = cpu::accumulator_of(hidden);
  const Tensor upstream = grad_sums.to(dtype).contiguous(), means = difference.to(dtype).contiguous();
  if (h.kind == cpu::Kind::kFloat64) {
    cpu::backward<double>(h, upstream, means, out);
  } else {
    cpu::backward<float>(h, upstream, means, out);
  }
  return gradients;
}

}  // namespace ear_ops
