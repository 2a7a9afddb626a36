"""The instruction set in use is the widest offered or the one forced, and every one of them repeats itself.

That the LoRA group equals its definition on each is said in test_lora.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aletheia_kernels import backends, cpu, lora_group
from aletheia_kernels.dtypes import has_vendor_products
from aletheia_kernels.reference import philox

OFFERED = cpu.offered_instruction_sets()


@pytest.fixture(params=OFFERED)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ALETHEIA_BACKEND", "cpu")
    monkeypatch.setenv("ALETHEIA_CPU_ISA", request.param)
    return request.param


def run(dtype: torch.dtype, tokens: int, features: int, dropout_p: float = 0.0) -> list[Tensor]:
    """Outputs and gradients of a group of three, at sizes that no register divides."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    outs, ranks = (37, 70, 129), (5, 1, 33)
    x = normal(tokens, features).requires_grad_()
    lora_As = [normal(rank, features).requires_grad_() for rank in ranks]
    lora_Bs = [normal(out, rank).requires_grad_() for out, rank in zip(outs, ranks, strict=True)]
    weights = [normal(out, features) for out in outs]
    ys = lora_group(
        x, weights, [None] * 3, lora_As, lora_Bs, [1.0] * 3, dropout_p=dropout_p, seed=torch.tensor([41])
    )
    grads = torch.autograd.grad(ys, [x, *lora_As, *lora_Bs], [normal(*y.shape) for y in ys])
    return [y.detach() for y in ys] + list(grads)


@pytest.mark.parametrize("unset", [None, ""])
def test_the_widest_offered_is_in_use(monkeypatch, unset):
    monkeypatch.delenv("ALETHEIA_CPU_ISA", raising=False)
    if unset is not None:
        monkeypatch.setenv("ALETHEIA_CPU_ISA", unset)
    assert cpu.instruction_set() == OFFERED[-1]
    assert cpu.INSTRUCTION_SETS[: len(OFFERED)] == OFFERED


def test_the_processor_is_read_as_torch_reads_it():
    assert cpu.features()["avx2"] == torch.cpu._is_avx2_supported()
    assert cpu.features()["avx512"] == torch.cpu._is_avx512_supported()
    assert cpu.features()["avx512_bf16"] == torch.cpu._is_avx512_bf16_supported()


def test_a_forced_set_is_in_use(instruction_set):
    assert cpu.instruction_set() == instruction_set


def test_attention_is_served_on_every_set(instruction_set):
    assert cpu.refusal("range_attention", torch.bfloat16) is None
    assert cpu.refusal("range_attention", torch.float32) is None
    assert cpu.refusal("range_attention", torch.float64) == "its attention has no torch.float64"


def test_a_dtype_is_the_vendor_librarys_where_the_processor_multiplies_it():
    assert has_vendor_products(torch.float32)
    assert has_vendor_products(torch.float64)
    if torch.cpu._is_avx2_supported():
        assert has_vendor_products(torch.bfloat16) == torch.cpu._is_avx512_bf16_supported()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_repeats_bit_for_bit(instruction_set, dtype, threads):
    torch.set_num_threads(threads)
    first, second = (run(dtype, tokens=301, features=97, dropout_p=0.3) for _ in range(2))
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_set_draws_the_mask_of_the_reference(instruction_set, dtype):
    # Identity adapters hand x̂ through, and what a unit gradient brings back is the mask. 331 columns: rows begin at
    # every phase of a Philox block, and are longer than the stretch of the mask that the kernels make at a time.
    features, seed = 331, torch.tensor([2**40 + 5])
    x = torch.ones(103, features, dtype=dtype, requires_grad=True)
    eye, zero = torch.eye(features, dtype=dtype), torch.zeros(features, features, dtype=dtype)
    (y,) = lora_group(x, [zero], [None], [eye], [eye], [1.0], dropout_p=0.5, seed=seed)
    y.backward(torch.ones_like(y))
    expected = 2.0 * philox.keep_mask(seed, x.shape, 0.5).to(dtype)
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_dropped_is_zero_whatever_it_would_have_been(instruction_set, dtype):
    x, seed = torch.ones(40, 33, dtype=dtype, requires_grad=True), torch.tensor([9])
    lora_A, lora_B = torch.full((1, 33), float("inf"), dtype=dtype), torch.ones(2, 1, dtype=dtype)
    weight = torch.zeros(2, 33, dtype=dtype)
    (y,) = lora_group(x, [weight], [None], [lora_A], [lora_B], [1.0], dropout_p=0.5, seed=seed)
    y.backward(torch.ones_like(y))
    keep = philox.keep_mask(seed, x.shape, 0.5)
    assert x.grad[keep].isposinf().all()
    assert (x.grad[~keep] == 0).all()


def test_an_unknown_set_is_an_error_that_says_what_there_is(monkeypatch):
    monkeypatch.setenv("ALETHEIA_CPU_ISA", "avx1024")
    expected = (
        f"ALETHEIA_CPU_ISA='avx1024' names no instruction set: this processor offers {', '.join(OFFERED)}"
    )
    for use in (cpu.instruction_set, lambda: run(torch.float32, 4, 3), backends.explain):
        with pytest.raises(RuntimeError) as raised:
            use()
        assert str(raised.value) == expected
    with pytest.raises(backends.BackendError):
        run(torch.float32, 4, 3)
    monkeypatch.setenv("ALETHEIA_BACKEND", "reference")  # which has no instruction set to choose
    run(torch.float32, 4, 3)


@pytest.mark.parametrize("name", cpu.INSTRUCTION_SETS)
def test_a_known_set_is_used_or_refused(monkeypatch, name):
    monkeypatch.setenv("ALETHEIA_CPU_ISA", name)
    if name in OFFERED:
        assert cpu.instruction_set() == name
    else:
        with pytest.raises(
            RuntimeError, match=f"ALETHEIA_CPU_ISA={name}: this processor offers {OFFERED[0]}"
        ):
            cpu.instruction_set()
