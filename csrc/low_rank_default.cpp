// The low-rank kernels in the compiler's baseline: SSE2 on x86-64, NEON on 64-bit ARM.
#include "low_rank_kernels.h"

#define ALETHEIA_LANES 4
#ifdef __x86_64__
#include <immintrin.h>
#define ALETHEIA_REGISTERS 16
#define ALETHEIA_MULTIPLY_WORDS(a, b) _mm_mul_epu32((__m128i)(a), (__m128i)(b))
#else
#define ALETHEIA_REGISTERS 32
#endif
#define ALETHEIA_KERNELS kDefaultKernels
#include "low_rank_vec.h"
