// The two views of an input, and their gradients: what every device does with tensors before its kernels run.
#pragma once

#include <ATen/core/List.h>

#include <array>
#include <initializer_list>
#include <vector>

#include "problem.h"

namespace ear_ops {

// The views of one input: both tensors, or the halves of the first.
inline std::array<Tensor, 2> split_views(const Tensor& first, const OptionalTensor& second, int64_t pairs) {
  if (second) return {first, *second};
  return {first.narrow(0, 0, pairs), first.narrow(0, pairs, pairs)};
}

inline OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : tensor;
}

struct Input {
  const Tensor& first;
  const OptionalTensor& second;
};

struct Gradients {
  std::vector<Tensor> returned;              // in the order of the operator's inputs
  std::vector<std::array<Tensor, 2>> views;  // of each input; undefined where it is not asked for
};

// make(like) gives a gradient's memory. `needs` names the first tensors of all inputs, then their second ones.
template <typename Make>
Gradients make_gradients(std::initializer_list<Input> inputs, const c10::List<bool>& needs, int64_t pairs,
                         const Make& make) {
  Gradients gradients;
  size_t need = 0;
  for (const Input& input : inputs) {
    auto& views = gradients.views.emplace_back();
    if (!needs.get(need++)) continue;
    const Tensor& gradient = gradients.returned.emplace_back(make(input.first));
    if (input.second) {
      views[0] = gradient;
    } else {
      views = split_views(gradient, std::nullopt, pairs);
    }
  }
  size_t index = 0;
  for (const Input& input : inputs) {
    auto& views = gradients.views[index++];
    if (needs.get(need++) && input.second) views[1] = gradients.returned.emplace_back(make(*input.second));
  }
  return gradients;
}

}  // namespace ear_ops
