// For AVX2, FMA and F16C.
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define PELT_ISA isa_avx2
#define PELT_BYTES 32
#define PELT_X86
#define PELT_TARGET "avx2,fma,f16c"
// clang-format off: the order is the point
#include "target_begin.h"
#include "kernels_impl.h"
// clang-format on

PELT_DEFINE_KERNELS(kernels_avx2, isa_avx2)
#include "target_end.h"
#endif
