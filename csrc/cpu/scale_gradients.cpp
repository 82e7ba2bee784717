// Multiplies the gradients that a forward has made by the upstream gradient of each pair, in one pass. torch would make
// float32 copies of 16-bit gradients first.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>

#include "isa.h"
#include "schedule.h"
#include "tensors.h"

namespace ear_ops::cpu {

namespace {

// Each gradient is [pairs, ...], or [2 pairs, ...] with both views; the products have the dtype `to`. A pair whose
// upstream gradient is 0 gets zeros, also where its gradient is not finite.
std::vector<Tensor> scale_gradients(at::TensorList gradients, const Tensor& upstream, at::ScalarType to) {
  constexpr int64_t kPart = 1 << 15;  // elements of a task
  const int64_t pairs = upstream.numel();
  std::vector<Tensor> scaled;
  for (const Tensor& given : gradients) {
    // Hooks of autograd may have changed what the forward saved.
    const bool is_double = to == at::kDouble;
    const Tensor gradient =
        (is_double == (given.scalar_type() == at::kDouble) ? given : given.to(is_double ? at::kDouble : at::kFloat))
            .contiguous();
    const int64_t rows = gradient.size(0);
    TORCH_CHECK_VALUE(rows == pairs || rows == 2 * pairs, "gradients: expected ", pairs, " or ", 2 * pairs,
                      " rows, as `upstream` has numbers or twice as many, got ", rows);
    Tensor& result = scaled.emplace_back(at::empty(gradient.sizes(), gradient.options().dtype(to)));
    if (gradient.numel() == 0) continue;
    const int64_t n = gradient.numel() / rows, parts = (n + kPart - 1) / kPart;
    with_accumulator(gradient, [&]<typename A>() {
      const auto& table = kernels<A>(*selection().isa);
      const Tensor factors = upstream.to(accumulator_of(gradient)).contiguous();
      const A* factor = factors.data_ptr<A>();
      const auto* from = static_cast<const char*>(gradient.const_data_ptr());
      auto* into = static_cast<char*>(result.data_ptr());
      run_tasks(rows * parts, workers_for(static_cast<double>(gradient.numel())), [&](int64_t, const auto& next) {
        for (int64_t i = next(); i < rows * parts; i = next()) {
          const int64_t row = i / parts, first = i % parts * kPart, count = std::min(kPart, n - first);
          const int64_t at = row * n + first;
          char* dst = into + at * result.element_size();
          if (factor[row % pairs] == 0) {
            std::memset(dst, 0, count * result.element_size());
          } else {
            table.scale_row(from + at * gradient.element_size(), kind_of(gradient), factor[row % pairs], count, dst,
                            kind_of(result));
          }
        }
      });
    });
  }
  return scaled;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ear_ops, m) {
  m.impl("scale_gradients", torch::dispatch(c10::DispatchKey::CPU, &scale_gradients));
}

}  // namespace ear_ops::cpu
