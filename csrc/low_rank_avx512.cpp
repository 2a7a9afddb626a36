// The low-rank kernels for AVX512 F, BW, DQ and VL.
#include "instruction_set.h"

#ifdef ALETHEIA_X86_SETS
#include <immintrin.h>

#include "low_rank_kernels.h"

// GCC 12 warns of its own intrinsics headers (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define ALETHEIA_LANES 16
#define ALETHEIA_REGISTERS 32
#define ALETHEIA_MULTIPLY_WORDS(a, b) _mm512_mul_epu32((__m512i)(a), (__m512i)(b))
#define ALETHEIA_KERNELS kAvx512Kernels
#include "low_rank_vec.h"
#endif
