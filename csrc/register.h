// Registers an operator's kernels of one device with torch's dispatcher. The operator is a function of a problem; torch
// hands over the fields of the schema one by one.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <string>

#include "problem.h"

namespace ear_ops {

template <auto kOperator, typename Function, typename Fields>
struct Flat;

template <auto kOperator, typename Result, typename Problem, typename... Fields>
struct Flat<kOperator, Result (*)(const Problem&), TypeList<Fields...>> {
  static Result call(Fields... fields) { return kOperator(Problem{fields...}); }
};

template <auto kOperator, typename Result, typename Problem, typename... Saved, typename... Fields>
struct Flat<kOperator, Result (*)(const Tensor&, const Problem&, Saved...), TypeList<Fields...>> {
  static Result call(const Tensor& grad_sums, Fields... fields, Saved... saved) {
    return kOperator(grad_sums, Problem{fields...}, saved...);
  }
};

template <typename Result, typename Problem>
typename Problem::Fields fields_of(Result (*)(const Problem&));
template <typename Result, typename Problem, typename... Saved>
typename Problem::Fields fields_of(Result (*)(const Tensor&, const Problem&, Saved...));

// The function of flat arguments that calls kOperator, which is a forward `Result(const Problem&)` or a backward
// `Result(const Tensor& grad_sums, const Problem&, what the forward saved..., needs)`.
template <auto kOperator>
constexpr auto flat() {
  return &Flat<kOperator, decltype(kOperator), decltype(fields_of(kOperator))>::call;
}

// What stands in the place of a derivative. It refuses a call that autograd would record, because the operator would
// silently have no gradient; every other call goes on to the device. ear_ops calls its operators from within its own
// autograd functions, where grad mode is off.
template <bool kIsBackward>
void refuse_gradient(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (at::GradMode::is_enabled()) {
    for (const c10::IValue& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
      if (!argument.isTensor() || !argument.toTensor().requires_grad()) continue;
      std::string name = op.schema().name();  // "ear_ops::qk_attention_mse"
      name.replace(name.find("::"), 2, ".");
      TORCH_CHECK(!kIsBackward, "torch.ops.", name,
                  " has no gradient of its own: second derivatives are not available from kernels; use "
                  "backend='reference'");
      TORCH_CHECK(false, "torch.ops.", name, " has no gradient of its own; call ", name, ", or detach the inputs");
    }
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

// Registers kForward as `name` and kBackward as `name`_backward.
template <auto kForward, auto kBackward>
void register_operator(torch::Library& library, const std::string& name, c10::DispatchKey device) {
  const auto autograd = c10::getAutogradKeyFromBackend(c10::toBackendComponent(device));
  const std::string backward = name + "_backward";
  library.impl(name.c_str(), torch::dispatch(device, flat<kForward>()));
  library.impl(backward.c_str(), torch::dispatch(device, flat<kBackward>()));
  library.impl(name.c_str(),
               torch::dispatch(autograd, torch::CppFunction::makeFromBoxedFunction<&refuse_gradient<false>>()));
  library.impl(backward.c_str(),
               torch::dispatch(autograd, torch::CppFunction::makeFromBoxedFunction<&refuse_gradient<true>>()));
}

}  // namespace ear_ops
