// The inner loops for x86-64 with AVX-512.
#if defined(__x86_64__)
#include "target.h"
EAR_OPS_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")
// Set by hand: __F16C__ does not follow a target that _Pragma sets.
#define EAR_OPS_VECTOR_BYTES 64
#define EAR_OPS_F16C
#define EAR_OPS_ISA kAvx512
#define EAR_OPS_ISA_NAME "avx512"
#include "kernels_impl.h"
EAR_OPS_TARGET_END
#endif
