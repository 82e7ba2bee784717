// Which instruction set the CPU kernels use: the best that this processor has, or the one that EAR_OPS_CPU_ISA names.
#pragma once

#include "kernels.h"

namespace ear_ops::cpu {

enum class Bf16Products {
  kNone,      // bfloat16 inputs are multiplied as float32: products are exact, and no matrix unit is used
  kMatrix,    // brgemm on a matrix unit (AMX)
  kEmulated,  // plain loops with the same packing and rounding, so that every machine can test that path
};

struct Selection {
  const char* name;  // portable, avx2, avx512, amx or amx-emulated
  const Isa* isa;
  Bf16Products bf16;
};

// Decided at the first call; raises where EAR_OPS_CPU_ISA names an instruction set that is unknown or missing here.
const Selection& selection();

}  // namespace ear_ops::cpu
