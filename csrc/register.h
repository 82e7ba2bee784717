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

template <auto kOperator, typename Result, typename Problem, typename... Rest, typename... Fields>
struct Flat<kOperator, Result (*)(const Problem&, Rest...), TypeList<Fields...>> {
  static Result call(Fields... fields, Rest... rest) { return kOperator(Problem{fields...}, rest...); }
};

template <auto kOperator, typename Result, typename Problem, typename... Saved, typename... Fields>
struct Flat<kOperator, Result (*)(const Tensor&, const Problem&, Saved...), TypeList<Fields...>> {
  static Result call(const Tensor& grad_sums, Fields... fields, Saved... saved) {
    return kOperator(grad_sums, Problem{fields...}, saved...);
  }
};

template <typename Result, typename Problem, typename... Rest>
typename Problem::Fields fields_of(Result (*)(const Problem&, Rest...));
template <typename Result, typename Problem, typename... Saved>
typename Problem::Fields fields_of(Result (*)(const Tensor&, const Problem&, Saved...));

// The function of flat arguments that calls kOperator, which is a forward `Result(const Problem&)`, one that makes the
// gradients, too, `Result(const Problem&, needs)`, or a backward `Result(const Tensor& grad_sums, const Problem&, what
// the forward saved..., needs)`.
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

template <auto kOperator, bool kIsBackward>
void register_kernel(torch::Library& library, const std::string& name, c10::DispatchKey device) {
  const auto autograd = c10::getAutogradKeyFromBackend(c10::toBackendComponent(device));
  library.impl(name.c_str(), torch::dispatch(device, flat<kOperator>()));
  library.impl(name.c_str(),
               torch::dispatch(autograd, torch::CppFunction::makeFromBoxedFunction<&refuse_gradient<kIsBackward>>()));
}

// Registers kForward as `name`.
template <auto kForward>
void register_forward(torch::Library& library, const std::string& name, c10::DispatchKey device) {
  register_kernel<kForward, false>(library, name, device);
}

// Registers kForward as `name` and kBackward as `name`_backward.
template <auto kForward, auto kBackward>
void register_operator(torch::Library& library, const std::string& name, c10::DispatchKey device) {
  register_kernel<kForward, false>(library, name, device);
  register_kernel<kBackward, true>(library, name + "_backward", device);
}

}  // namespace ear_ops
