// Argument errors of the operators, worded alike: operator, tensor, what was expected, what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace ear_ops {

inline void check_shape(const char* op, const char* name, const at::Tensor& tensor, at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, op, ": ", name, ": expected shape ", expected, ", got ",
                    tensor.sizes());
}

inline void check_dim(const char* op, const char* name, const at::Tensor& tensor, int64_t dim, const char* layout) {
  TORCH_CHECK_VALUE(tensor.dim() == dim, op, ": ", name, ": expected ", dim, " dimensions ", layout, ", got shape ",
                    tensor.sizes());
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType expected) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == expected, op, ": ", name, ": expected dtype ", expected, ", got ",
                   tensor.scalar_type());
}

inline void check_optional(const char* op, const char* name, const std::optional<at::Tensor>& tensor,
                           at::IntArrayRef shape, at::ScalarType dtype) {
  if (!tensor) return;
  check_shape(op, name, *tensor, shape);
  check_dtype(op, name, *tensor, dtype);
}

// Two views in one tensor come x first: an even number of rows.
inline int64_t pairs_of(const char* op, const char* name, const at::Tensor& both, bool stacked) {
  TORCH_CHECK_VALUE(!stacked || both.size(0) % 2 == 0, op, ": ", name,
                    ": expected an even batch with both views, got shape ", both.sizes());
  return stacked ? both.size(0) / 2 : both.size(0);
}

}  // namespace ear_ops
