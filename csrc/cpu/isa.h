// Which instruction set the CPU kernels use: the best that this processor has, or the one that EAR_OPS_CPU_ISA names.
#pragma once

#include "kernels.h"

namespace ear_ops::cpu {

enum class Bf16Products {
  kNone,    // bfloat16 inputs are multiplied as float32: products are exact
  kDot,     // in twos in vector registers, by brgemm (avx512_bf16)
  kMatrix,  // on a matrix unit, by brgemm (AMX); queries and keys are padded to the rows that it holds
};

struct Selection {
  const char* name;  // portable, avx2, avx512, avx512_bf16, amx, or one of the last two with -emulated
  const Isa* isa;
  Bf16Products bf16;
  bool emulated;  // plain loops in the place of brgemm, so that every machine can test the rest of that path
};

// Decided at the first call; raises where EAR_OPS_CPU_ISA names an instruction set that is unknown or missing here.
const Selection& selection();

}  // namespace ear_ops::cpu
