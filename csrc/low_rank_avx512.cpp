// The low-rank kernels for AVX512 F, BW, DQ and VL.
#include "instruction_set.h"

#ifdef ALETHEIA_X86_SETS
#include "low_rank_kernels.h"
#include "philox.h"

#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define ALETHEIA_LANES 16
#define ALETHEIA_REGISTERS 32
#define ALETHEIA_KERNELS kAvx512Kernels
#include "low_rank_vec.h"
#endif
