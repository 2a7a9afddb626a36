"""The instruction set in use is the widest offered or the one forced, and every one of them repeats itself.

That the LoRA group equals its definition on each is said in test_lora.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from aletheia_kernels import cpu, lora_group
from aletheia_kernels.dtypes import has_vendor_products
from aletheia_kernels.reference import philox

OFFERED = cpu.offered_instruction_sets()


@pytest.fixture(params=OFFERED)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("ALETHEIA_BACKEND", "cpu")
    with cpu.forced_instruction_set(request.param):
        yield request.param


def in_a_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """With the wishes of the environment that the tests run in taken out, and these in it."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("ALETHEIA_")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain | variables)


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


NAMED = "from aletheia_kernels import cpu; print(cpu.instruction_set())"


@pytest.mark.parametrize("variables", [{}, {"ALETHEIA_CPU_ISA": ""}])
def test_the_widest_offered_is_in_use(variables):
    assert in_a_process(NAMED, **variables).stdout.strip() == OFFERED[-1]
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


UNKNOWN = """
import os, torch
from aletheia_kernels import backends, cpu, lora_group

x, lora_A, lora_B, weight = torch.zeros(4, 3), torch.zeros(1, 3), torch.zeros(2, 1), torch.zeros(2, 3)
run = lambda: lora_group(x, [weight], [None], [lora_A], [lora_B], [1.0])
for use in (run, backends.explain, cpu.instruction_set):
    try:
        use()
    except RuntimeError as error:
        print(type(error).__name__, str(error).splitlines()[0])
os.environ["ALETHEIA_BACKEND"] = "reference"  # which has no instruction set to choose
run()
"""


def test_an_unknown_set_is_an_error_that_says_what_there_is():
    what = f"'avx1024' names no instruction set: this processor offers {', '.join(OFFERED)}"
    with pytest.raises(RuntimeError) as raised, cpu.forced_instruction_set("avx1024"):
        pass
    assert str(raised.value) == what
    assert cpu.instruction_set() in OFFERED
    done = in_a_process(UNKNOWN, ALETHEIA_CPU_ISA="avx1024")
    assert done.returncode == 0, done.stderr
    kinds, texts = zip(*(line.split(" ", 1) for line in done.stdout.splitlines()), strict=True)
    assert kinds == ("BackendError", "BackendError", "RuntimeError")
    assert set(texts) == {f"ALETHEIA_CPU_ISA={what}"}


@pytest.mark.parametrize("name", cpu.INSTRUCTION_SETS)
def test_a_known_set_is_used_or_refused(name):
    done = in_a_process(NAMED, ALETHEIA_CPU_ISA=name)
    if name in OFFERED:
        assert done.stdout.strip() == name
        with cpu.forced_instruction_set(name):
            assert cpu.instruction_set() == name
    else:
        what = f"{name}: this processor offers {OFFERED[0]}"
        assert f"ALETHEIA_CPU_ISA={what}" in done.stderr
        with pytest.raises(RuntimeError, match=f"^{what}"), cpu.forced_instruction_set(name):
            pass


def test_a_set_can_be_forced_before_anything_else_is_done():
    code = "from aletheia_kernels import cpu\nwith cpu.forced_instruction_set('default'): print(cpu.instruction_set())"
    assert in_a_process(code).stdout.strip() == "default"


def test_without_the_extension_there_is_no_set_to_force(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "it was not built")
    with pytest.raises(RuntimeError, match="it was not built"), cpu.forced_instruction_set("default"):
        pass


def test_the_set_before_comes_back():
    before = cpu.instruction_set()
    with pytest.raises(ZeroDivisionError), cpu.forced_instruction_set("default"):
        raise ZeroDivisionError
    assert cpu.instruction_set() == before


# accelerate empties the environment for a moment whenever a training begins, in a thread or not.
BESIDE_AN_ENVIRONMENT_THAT_CHANGES = """
import os, sys, threading, time, torch
from aletheia_kernels import cpu, lora_group

cpu.unavailable_reason()
sys.setswitchinterval(1e-5)
end = time.monotonic() + 4

def empty_and_fill():
    while time.monotonic() < end:
        whole = os.environ.copy()
        os.environ.clear()
        os.environ.update(whole)

threading.Thread(target=empty_and_fill).start()
x, lora_A, lora_B, weight = torch.zeros(4, 3), torch.zeros(1, 3), torch.zeros(2, 1), torch.zeros(2, 3)
sets = set()
while time.monotonic() < end:
    lora_group(x, [weight], [None], [lora_A], [lora_B], [1.0])
    sets.add(cpu.instruction_set())
print(*sets)
"""


def test_the_environment_may_change_while_operators_run():
    done = in_a_process(BESIDE_AN_ENVIRONMENT_THAT_CHANGES, ALETHEIA_CPU_ISA="default")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["default"]
