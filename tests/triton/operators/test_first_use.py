"""The check of an operator on the device it is first used on: right kernels pass it, wrong ones do not serve."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import aletheia_kernels
from aletheia_kernels import backends, triton
from aletheia_kernels.triton import first_use, grad_norm

OPERATOR = "bias_grad_norm_sq"


@pytest.fixture(autouse=True)
def nothing_was_used_yet(monkeypatch):
    monkeypatch.setattr(first_use, "_refusals", {})


@pytest.fixture
def as_a_card(monkeypatch, device):
    """The interpreter's device, taken for a card."""
    monkeypatch.setattr(first_use, "_is_card", lambda device: True)
    monkeypatch.setattr(first_use, "_is_traced", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return device


@pytest.fixture
def wrong_kernel(monkeypatch):
    """A kernel that runs and writes nothing useful."""
    monkeypatch.setattr(
        triton.operators(), OPERATOR, lambda dy: dy.new_zeros((), dtype=torch.float32), raising=False
    )


@pytest.mark.parametrize("operator", sorted(triton.SERVED))
@pytest.mark.parametrize("dtype", triton.DTYPES)
def test_every_operator_passes(operator, dtype, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first_use.check(operator, device, dtype) is None


def test_a_right_kernel_is_checked_once_and_serves(as_a_card, monkeypatch):
    checks = []
    right = first_use.check
    monkeypatch.setattr(first_use, "check", lambda *arguments: checks.append(arguments) or right(*arguments))
    for _ in range(2):
        assert backends.choose(OPERATOR, as_a_card, torch.float32).backend == "triton"
    assert len(checks) == 1


def test_a_wrong_kernel_warns_once_with_what_to_report_and_does_not_serve(
    as_a_card, wrong_kernel, monkeypatch
):
    monkeypatch.delenv("ALETHEIA_BACKEND")
    monkeypatch.setattr(first_use, "_name", lambda device: "Card 9000")
    with pytest.warns(
        RuntimeWarning, match="Please report it to the aletheia-kernels issue tracker"
    ) as caught:
        choice = backends.choose(OPERATOR, as_a_card, torch.float32)
    assert len(caught) == 1
    for part in ("bias_grad_norm_sq in float32 on Card 9000", torch.__version__, "relative error of 1.0e+00"):
        assert part in str(caught[0].message)
    assert choice.backend != "triton"
    dy = torch.randn(5, 3, device=as_a_card)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm = aletheia_kernels.bias_grad_norm_sq(dy)
    torch.testing.assert_close(norm, dy.sum(0).square().sum())


def test_a_kernel_that_raises_does_not_serve(as_a_card, monkeypatch):
    def launch(*_):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(grad_norm, "launch", launch)
    with (
        pytest.warns(RuntimeWarning, match="no kernel image is available"),
        pytest.raises(backends.BackendError, match="self-test failed"),
    ):
        backends.choose(OPERATOR, as_a_card, torch.float32)


def test_nothing_is_checked_while_tracing(as_a_card, wrong_kernel, monkeypatch):
    monkeypatch.setattr(first_use, "_is_traced", lambda: True)
    assert first_use.refusal(OPERATOR, as_a_card, torch.float32) is None
    assert first_use._refusals == {}


def test_the_check_leaves_no_trace_in_what_surrounds_it(as_a_card):
    """In a checkpointed layer's first forward, under autocast, random state and saved tensors stay the layer's."""
    x = torch.randn(6, 5, device=as_a_card, requires_grad=True)
    weight, lora_A, lora_B = (torch.randn(shape, device=as_a_card) for shape in ((4, 5), (2, 5), (4, 2)))

    def layer(x):
        (y,) = aletheia_kernels.lora_group(x, [weight], [None], [lora_A], [lora_B], [1.0])
        return y.relu()

    before = torch.get_rng_state()
    with torch.autocast(as_a_card.type, dtype=torch.bfloat16):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert any(key[0] == "lora_group" for key in first_use._refusals)
    assert x.grad is not None
