// For AVX-512 (F, BW, VL, DQ).
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define PELT_ISA isa_avx512
#define PELT_BYTES 64
#define PELT_X86
#define PELT_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512"
// clang-format off: the order is the point
#include "target_begin.h"
#include "kernels_impl.h"
// clang-format on

PELT_DEFINE_KERNELS(kernels_avx512, isa_avx512)
#include "target_end.h"
#endif
