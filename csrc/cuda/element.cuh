// Picks the instance of a kernel that reads rows of tensors as they are.
#pragma once

#include <type_traits>

#include "args.h"
#include "primitives.cuh"

namespace ear_ops::cuda {

// Calls body(a value of the element type, whether rows are read 16 bytes at a time, as a type).
template <typename Body>
const char* with_element(Element element, bool vectorized, const Body& body) {
  switch (element) {
    case Element::kFloat32:
      return vectorized ? body(float{}, std::true_type{}) : body(float{}, std::false_type{});
    case Element::kBFloat16:
      return vectorized ? body(bfloat16{}, std::true_type{}) : body(bfloat16{}, std::false_type{});
    default:
      return vectorized ? body(float16{}, std::true_type{}) : body(float16{}, std::false_type{});
  }
}

}  // namespace ear_ops::cuda
