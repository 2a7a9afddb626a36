"""The dtype that sums are carried in, and the dtypes that a vendor library multiplies."""

from __future__ import annotations

import platform

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for every floating dtype but float64, which stays itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_vendor_products(dtype: torch.dtype) -> bool:
    """Whether a vendor library multiplies in a floating dtype by instructions that this processor has for it.

    Half precision is oneDNN's: bfloat16 with AVX512-BF16, AMX or Arm's bf16 extension, float16 with AVX512-FP16.
    Without it torch multiplies in scalar loops: on an AVX2 processor, the product for a linear's input gradient took 90
    times as long in bfloat16 as in float32. With AVX-512 alone oneDNN widens bfloat16 as it multiplies: on two cores
    of an Intel Ice Lake 57 to 67 GFLOP/s, against 194 to 270 in float32. The compiled operators do not depend on it
    there: with AVX512-VNNI they multiply bfloat16 in fixed point (csrc/fixed_point.h).
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    library = torch.ops.mkldnn
    if dtype == torch.float16:
        return library._is_mkldnn_fp16_supported()
    if platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_avx512_bf16_supported():
        return False
    return library._is_mkldnn_bf16_supported()
