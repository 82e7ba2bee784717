#pragma once

#include "inputs.h"

namespace ear_ops::cpu {

// Fills sums [B, H] and row_stats [row_stats_of, B, H, L], of the accumulator's type; rows that do not count keep what
// is there.
void qk_forward(const QKInputs& inputs, Tensor& sums, Tensor& row_stats);

}  // namespace ear_ops::cpu
