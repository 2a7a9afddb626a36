"""The dtype that sums are carried in, and the dtypes that a vendor library multiplies."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for every floating dtype but float64, which stays itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_vendor_products(dtype: torch.dtype) -> bool:
    """Whether this processor's products in a floating dtype are a vendor library's.

    Half precision is oneDNN's: bfloat16 from AVX-512 on and on Arm with the bf16 extension, float16 from AVX512-FP16.
    Without it torch multiplies in scalar loops: on an AVX2 processor, the product for a linear's input gradient took 90
    times as long in bfloat16 as in float32.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    library = torch.ops.mkldnn
    has = library._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else library._is_mkldnn_fp16_supported
    return has()
