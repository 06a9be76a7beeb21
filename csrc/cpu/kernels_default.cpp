// For any processor: vectors of 16 bytes, which every compiler target has or imitates.
#define PELT_ISA isa_default
#define PELT_BYTES 16
#include "kernels_impl.h"

PELT_DEFINE_KERNELS(kernels_default, isa_default)
