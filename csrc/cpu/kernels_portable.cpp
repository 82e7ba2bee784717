// The inner loops for any processor: whatever the compiler's default target is.
#define EAR_OPS_ISA kPortable
#define EAR_OPS_ISA_NAME "portable"
#include "kernels_impl.h"
