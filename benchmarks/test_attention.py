"""range_attention against scaled_dot_product_attention, causal, in the dtype whose products run at full rate here."""

from __future__ import annotations

import pytest
import torch

from aletheia_kernels import range_attention
from aletheia_kernels.dtypes import has_vendor_products
from benchmarks.shapes import PASSES, SHAPES


@pytest.mark.parametrize("name", ["ours", "torch"])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(benchmark, measure, shape, which, name):
    benchmark.group = f"attention {shape} {which}"
    torch.manual_seed(0)
    dtype = torch.bfloat16 if has_vendor_products(torch.bfloat16) else torch.float32
    q, k, v = (
        torch.randn(1, shape.tokens, heads, shape.head_dim).to(dtype).transpose(1, 2).requires_grad_()
        for heads in (shape.heads, shape.key_heads, shape.key_heads)
    )
    last = torch.arange(1, shape.tokens + 1, dtype=torch.int32)[None]
    first = torch.zeros_like(last)
    upstream = torch.randn(1, shape.tokens, shape.heads, shape.head_dim).to(dtype).transpose(1, 2)

    def ours():
        return [range_attention(q, k, v, first, last)]

    def plain():
        return [torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)]

    measure({"ours": ours, "torch": plain}, name, which, [q, k, v], [upstream])
