// The low-rank kernels for AVX2 with FMA.
#include "instruction_set.h"

#ifdef ALETHEIA_X86_SETS
#include <immintrin.h>

#include "low_rank_kernels.h"

#pragma GCC target("avx2,fma")
#define ALETHEIA_LANES 8
#define ALETHEIA_REGISTERS 16
#define ALETHEIA_MULTIPLY_WORDS(a, b) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#define ALETHEIA_KERNELS kAvx2Kernels
#include "low_rank_vec.h"
#endif
