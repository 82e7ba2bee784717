// Squared distance between the masked means of two views: one pass over the hidden states, the means in scratch.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <functional>

#include "isa.h"
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

  const char* row(int view, int64_t b, int64_t i) const {
    const Tensor& t = views[view];
    return static_cast<const char*>(t.data_ptr()) + (b * t.stride(0) + i * t.stride(1)) * t.element_size();
  }
  bool real(int view, int64_t b, int64_t i) const {
    const uint8_t* row = mask_row(mask, view * pairs + b);
    return !row || row[i];
  }
  int64_t count(int view, int64_t b) const {
    int64_t n = 0;
    for (int64_t i = 0; i < length; ++i) n += real(view, b, i);
    return n;
  }
};

Hidden make_hidden(const Tensor& hidden, const OptionalTensor& hidden_aug, const OptionalTensor& mask) {
  check_dim(kOp, "hidden", hidden, 3, "[B, L, C]");
  Hidden h;
  h.pairs = pairs_of(kOp, "hidden", hidden, !hidden_aug.has_value());
  h.length = hidden.size(1), h.features = hidden.size(2);
  check_optional(kOp, "hidden_aug", hidden_aug, hidden.sizes(), hidden.scalar_type());
  check_optional(kOp, "mask", mask, {2 * h.pairs, h.length}, at::kBool);
  h.views = split_views(hidden, hidden_aug, h.pairs);
  h.mask = dense(mask);
  h.kind = kind_of(kOp, hidden);
  return h;
}

template <typename A>
void forward(const Hidden& h, Tensor& sums, Tensor& difference) {
  const auto& table = kernels<A>(*selection().isa);
  A* sum = sums.data_ptr<A>();
  A* means = difference.data_ptr<A>();
  at::parallel_for(0, h.pairs, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> total(h.features), mean(h.features);
    for (int64_t b = begin; b < end; ++b) {
      A* out = means + b * h.features;
      for (int v = 0; v < 2; ++v) {
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t i = 0; i < h.length; ++i)
          if (h.real(v, b, i)) table.add_row(h.row(v, b, i), h.kind, h.features, total.data());
        const double count = static_cast<double>(std::max<int64_t>(h.count(v, b), 1));
        for (int64_t c = 0; c < h.features; ++c) mean[c] = v == 0 ? total[c] / count : mean[c] - total[c] / count;
      }
      double squared = 0;
      for (int64_t c = 0; c < h.features; ++c) {
        squared += mean[c] * mean[c];
        out[c] = static_cast<A>(mean[c]);
      }
      sum[b] = static_cast<A>(squared);
    }
  });
}

// Every real token of a sequence has the same gradient: it is converted once and copied.
template <typename A>
void backward(const Hidden& h, const Tensor& grad_sums, const Tensor& difference, const std::array<Tensor, 2>& out) {
  const auto& table = kernels<A>(*selection().isa);
  const A* upstream = grad_sums.data_ptr<A>();
  const A* means = difference.data_ptr<A>();
  const int64_t row_bytes = h.features * h.views[0].element_size();
  at::parallel_for(0, h.pairs, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> row(row_bytes);
    for (int64_t b = begin; b < end; ++b) {
      for (int v = 0; v < 2; ++v) {
        if (!out[v].defined()) continue;
        const A count = static_cast<A>(std::max<int64_t>(h.count(v, b), 1));
        table.scale_row(means + b * h.features, (v == 0 ? 2 : -2) * upstream[b] / count, h.features, h.kind,
                        row.data());
        char* to = static_cast<char*>(out[v].data_ptr()) + b * h.length * row_bytes;
        for (int64_t i = 0; i < h.length; ++i, to += row_bytes) {
          if (h.real(v, b, i)) {
            std::memcpy(to, row.data(), row_bytes);
          } else {
            std::memset(to, 0, row_bytes);
          }
        }
      }
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

std::vector<Tensor> pooled_distance_backward(const Tensor& grad_sums, const Tensor& difference, const Tensor& hidden,
                                             const OptionalTensor& hidden_aug, const OptionalTensor& mask,
                                             const c10::List<bool>& needs) {
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
