// The inner loops for x86-64 with AVX2.
#if defined(__x86_64__)
#include "target.h"
EAR_OPS_TARGET("avx2,fma,f16c,bmi,bmi2")
#define EAR_OPS_ISA kAvx2
#define EAR_OPS_ISA_NAME "avx2"
#include "kernels_impl.h"
EAR_OPS_TARGET_END
#endif
