// The low-rank kernels for AVX2 with FMA.
#include "instruction_set.h"

#ifdef ALETHEIA_X86_SETS
#include "low_rank_kernels.h"
#include "philox.h"

#pragma GCC target("avx2,fma")
#define ALETHEIA_LANES 8
#define ALETHEIA_REGISTERS 16
#define ALETHEIA_KERNELS kAvx2Kernels
#include "low_rank_vec.h"
#endif
