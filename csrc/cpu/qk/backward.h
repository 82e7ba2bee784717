#pragma once

#include "inputs.h"

namespace ear_ops::cpu {

struct QKGradients {  // of each view, shaped like the inputs; data null where it is not asked for
  std::array<HeadsPointer, 2> query, key;
};

// Fills the gradients of every query and key that is compared and leaves the others as they are. grad_sums [B, H] and
// row_stats [row_stats_of, B, H, L] are contiguous and of the accumulator's type.
void qk_backward(const QKInputs& inputs, const Tensor& grad_sums, const Tensor& row_stats, const QKGradients& out);

}  // namespace ear_ops::cpu
