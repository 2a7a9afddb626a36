"""A check of every operator against the float64 reference, in seconds: what a user runs on a machine nobody tested."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import aletheia_kernels
from aletheia_kernels import backends, reference

# What an operator gave, and what it should have.
_Found = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class SelfTestResult:
    """One operator's check: ``error`` and ``allowed`` are relative (RMS against float64), ``seconds`` wall-clock."""

    operator: str
    backend: str
    ok: bool
    error: float
    allowed: float
    seconds: float


def _width(width: int) -> int:
    """``width`` on a processor; on a card the next multiple of 16, for which kernels have other machine code."""
    return width if torch.get_default_device().type == "cpu" else -(-width // 16) * 16


def _relative(given: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of any output; NaN if there is one."""
    errors = []
    for got, want in zip(given, expected, strict=True):
        scale = want.double().norm().item() or 1.0
        errors.append((got.double() - want.double()).norm().item() / scale)
    return max(errors, key=_badness)


def _badness(error: float) -> float:
    # NaN compares as neither more nor less: `max` alone would pass over it.
    return math.inf if math.isnan(error) else error


# Ranks of any number, and those that 8 divides: on a card these run other machine code.
_RANKS = ((3, 20, 5), (8, 24, 16))


def _each(check: Callable[..., _Found], dtype: torch.dtype, *cases: Any) -> _Found:
    """What the check finds for every case, end to end."""
    found = [check(dtype, case) for case in cases]
    return [t for given, _ in found for t in given], [t for _, expected in found for t in expected]


def _lora(dtype: torch.dtype) -> _Found:
    return _each(_lora_of, dtype, *_RANKS)


def _lora_of(dtype: torch.dtype, ranks: tuple[int, ...]) -> _Found:
    width, outs, ranks = _width(70), (_width(65), 48), ranks[:2]
    x = torch.randn(61, width).to(dtype)
    weights = [torch.randn(n, width).div(8).to(dtype) for n in outs]
    biases = [torch.randn(outs[0]).to(dtype), None]
    lora_As = [torch.randn(r, width).div(8).to(dtype) for r in ranks]
    lora_Bs = [torch.randn(n, r).div(4).to(dtype) for n, r in zip(outs, ranks, strict=True)]
    dys = [torch.randn(61, n).to(dtype) for n in outs]
    seed = torch.tensor([20260604])

    def run(as_dtype: torch.dtype, group: Callable[..., list[Tensor]]) -> list[Tensor]:
        leaves = [t.to(as_dtype, copy=True).requires_grad_() for t in (x, *lora_As, *lora_Bs)]
        ys = group(leaves[0], leaves[1:3], leaves[3:5], as_dtype)
        torch.autograd.backward(ys, [dy.to(as_dtype) for dy in dys])
        return [*(y.detach() for y in ys), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def operator(x: Tensor, As: list[Tensor], Bs: list[Tensor], _: torch.dtype) -> list[Tensor]:
        return aletheia_kernels.lora_group(x, weights, biases, As, Bs, [2.0, 0.5], dropout_p=0.25, seed=seed)

    def plain(x: Tensor, As: list[Tensor], Bs: list[Tensor], as_dtype: torch.dtype) -> list[Tensor]:
        wide_biases = [b if b is None else b.to(as_dtype) for b in biases]
        wide_weights = [w.to(as_dtype) for w in weights]
        return reference.lora_group_forward(x, wide_weights, wide_biases, As, Bs, [2.0, 0.5], 0.25, seed)[0]

    return run(dtype, operator), run(torch.float64, plain)


def _gated_mlp(dtype: torch.dtype) -> _Found:
    return _each(_gated_mlp_of, dtype, *_RANKS)


def _gated_mlp_of(dtype: torch.dtype, ranks: tuple[int, ...]) -> _Found:
    middle, out = _width(65), _width(30)
    shapes = [(middle, 48), (middle, 48), (out, middle)]
    x, dy = torch.randn(70, 48).to(dtype), torch.randn(70, out).to(dtype)
    weights = [torch.randn(shape).div(8).to(dtype) for shape in shapes]
    lora_As = [torch.randn(r, inner).div(8).to(dtype) for r, (_, inner) in zip(ranks, shapes, strict=True)]
    lora_Bs = [torch.randn(outer, r).div(4).to(dtype) for r, (outer, _) in zip(ranks, shapes, strict=True)]
    rest = [None] * 3, [2.0, 0.5, 1.0]

    def run(as_dtype: torch.dtype, mlp: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.to(as_dtype, copy=True).requires_grad_() for t in (x, *lora_As, *lora_Bs)]
        y = mlp(leaves[0], [w.to(as_dtype) for w in weights], leaves[1:4], leaves[4:])
        y.backward(dy.to(as_dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def operator(x: Tensor, weights: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> Tensor:
        return aletheia_kernels.lora_gated_mlp(x, weights, rest[0], As, Bs, rest[1])

    def plain(x: Tensor, weights: list[Tensor], As: list[Tensor], Bs: list[Tensor]) -> Tensor:
        return reference.lora_gated_mlp_forward(x, weights, rest[0], As, Bs, rest[1], "silu")[0]

    return run(dtype, operator), run(torch.float64, plain)


def _experts(dtype: torch.dtype) -> _Found:
    return _each(_experts_of, dtype, (3, 20, 7), None)


def _experts_of(dtype: torch.dtype, each: tuple[int, ...] | None) -> _Found:
    offs = torch.tensor([20, 20, 57], dtype=torch.int32)
    ranks = None if each is None else torch.tensor(each, dtype=torch.int32)
    rank = 16 if each is None else max(each)
    scalings = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float32)
    out = _width(65)
    x, weight = torch.randn(61, 48).to(dtype), torch.randn(3, out, 48).div(8).to(dtype)
    lora_A, lora_B = torch.randn(3, rank, 48).div(8).to(dtype), torch.randn(3, out, rank).div(4).to(dtype)
    dy = torch.randn(61, out).to(dtype)

    def run(as_dtype: torch.dtype, experts: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.to(as_dtype, copy=True).requires_grad_() for t in (x, lora_A, lora_B)]
        y = experts(leaves[0], weight.to(as_dtype), *leaves[1:], scalings, offs, ranks)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(as_dtype))]

    def plain(*arguments: Any) -> Tensor:
        return reference.lora_experts_forward(*arguments)[0]

    return run(dtype, aletheia_kernels.lora_experts), run(torch.float64, plain)


def _pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(150, 96).to(dtype), torch.randn(150, _width(130)).to(dtype)


def _weight_norm(dtype: torch.dtype) -> _Found:
    x, dy = _pair(dtype)
    expected = (dy.double().T @ x.double()).square().sum()
    given = [aletheia_kernels.weight_grad_norm_sq(x, dy, method=method) for method in ("tiles", "gram")]
    return given, [expected, expected]


def _weight_norms(dtype: torch.dtype) -> _Found:
    pairs = [_pair(dtype), _pair(dtype)]
    expected = [(dy.double().T @ x.double()).square().sum() for x, dy in pairs]
    xs, dys = zip(*pairs, strict=True)
    return list(aletheia_kernels.weight_grad_norms_sq(xs, dys)), expected


def _example_norms(dtype: torch.dtype) -> _Found:
    x, dy = _pair(dtype)
    x, dy = x.view(3, 50, -1), dy.view(3, 50, -1)
    expected = (dy.double().mT @ x.double()).square().sum((1, 2))
    return [aletheia_kernels.weight_grad_norm_sq_per_example(x, dy)], [expected]


def _sketch(dtype: torch.dtype) -> _Found:
    x, dy = _pair(dtype)
    omega = torch.randn(96, 16).to(dtype)
    given = aletheia_kernels.weight_grad_norm_sq_sketch(x, dy, omega)
    return list(given), list(reference.weight_grad_norm_sq_sketch(x.double(), dy.double(), omega.double()))


def _embedding(dtype: torch.dtype) -> _Found:
    _, dy = _pair(dtype)
    indices = torch.randint(0, 40, (150,))
    expected = (
        torch.zeros(40, dy.shape[1], dtype=torch.float64).index_add_(0, indices, dy.double()).square().sum()
    )
    return [aletheia_kernels.embedding_grad_norm_sq(indices, dy)], [expected]


def _bias(dtype: torch.dtype) -> _Found:
    _, dy = _pair(dtype)
    return [aletheia_kernels.bias_grad_norm_sq(dy)], [dy.double().sum(0).square().sum()]


def _cross_entropy(dtype: torch.dtype) -> _Found:
    h, weight = torch.randn(37, 64).to(dtype), torch.randn(501, 64).div(4).to(dtype)
    labels = torch.randint(0, 501, (37,))
    leaf, wide = h.clone().requires_grad_(), h.double().requires_grad_()
    loss = aletheia_kernels.linear_cross_entropy(leaf, weight, labels)
    expected = torch.nn.functional.cross_entropy(wide @ weight.double().T, labels, reduction="sum")
    grads = torch.autograd.grad(loss, leaf) + torch.autograd.grad(expected, wide)
    return [loss.detach(), grads[0]], [expected.detach(), grads[1]]


def _attention(dtype: torch.dtype) -> _Found:
    q, k, v = (torch.randn(2, heads, 70, 24).to(dtype) for heads in (4, 2, 2))
    last = torch.arange(1, 71, dtype=torch.int32).expand(2, 70)
    first = (last - 50).clamp_min(0)

    def run(as_dtype: torch.dtype, attend: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.to(as_dtype, copy=True).requires_grad_() for t in (q, k, v)]
        o = attend(*leaves)
        return [o.detach(), *torch.autograd.grad(o.square().sum(), leaves)]

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return aletheia_kernels.range_attention(q, k, v, first, last)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention_forward(q, k, v, first, last, 24**-0.5)[0]

    return run(dtype, operator), run(torch.float64, plain)


def _rms_norm(dtype: torch.dtype) -> _Found:
    x, weight, dy = torch.randn(41, 70).to(dtype), torch.randn(70).to(dtype), torch.randn(41, 70).to(dtype)

    def run(as_dtype: torch.dtype, norm: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.to(as_dtype, copy=True).requires_grad_() for t in (x, weight)]
        y = norm(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(as_dtype))]

    def operator(x: Tensor, weight: Tensor) -> Tensor:
        return aletheia_kernels.rms_norm(x, weight, 1e-5, offset=1.0)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return reference.rms_norm_forward(x, weight, 1e-5, 1.0, True)[0]

    return run(dtype, operator), run(torch.float64, plain)


def _rotary(dtype: torch.dtype) -> _Found:
    q, k, dq, dk = (torch.randn(2, heads, 35, 24).to(dtype) for heads in (4, 2, 4, 2))
    cos, sin = torch.randn(2, 35, 18).to(dtype), torch.randn(2, 35, 18).to(dtype)

    def run(as_dtype: torch.dtype, rotate: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        leaves = [t.to(as_dtype, copy=True).requires_grad_() for t in (q, k)]
        turned = rotate(*leaves, cos.to(as_dtype), sin.to(as_dtype))
        grads = torch.autograd.grad(turned, leaves, [dq.to(as_dtype), dk.to(as_dtype)])
        return [*(t.detach() for t in turned), *grads]

    return run(dtype, aletheia_kernels.rotary), run(torch.float64, reference.rotary_forward)


_CHECKS = {
    "lora_group": _lora,
    "lora_gated_mlp": _gated_mlp,
    "lora_experts": _experts,
    "weight_grad_norm_sq": _weight_norm,
    "weight_grad_norms_sq": _weight_norms,
    "weight_grad_norm_sq_per_example": _example_norms,
    "weight_grad_norm_sq_sketch": _sketch,
    "embedding_grad_norm_sq": _embedding,
    "bias_grad_norm_sq": _bias,
    "linear_cross_entropy": _cross_entropy,
    "range_attention": _attention,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
}
# Relative RMS error allowed: a few units in the last place of the dtype, for sums of a few hundred terms.
_ALLOWED = {torch.float32: 1e-5, torch.float16: 2.5e-3, torch.bfloat16: 2e-2}


def _allowed(device: torch.device, dtype: torch.dtype) -> float:
    # A user who lets the vendor library round float32 to TF32 gets the products that he asked for.
    if dtype == torch.float32 and device.type == "cuda" and _tf32_is_allowed():
        return _ALLOWED[torch.float16]
    return _ALLOWED[dtype]


def _tf32_is_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    # torch before 2.9 has the one, and later ones may raise at the other.
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


@contextlib.contextmanager
def _random_state_of_its_own(device: torch.device) -> Iterator[None]:
    """The processor's and the device's generator begin at one seed inside. (`torch.manual_seed` seeds every card.)"""
    on_card = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_card else []):
        torch.default_generator.manual_seed(0)
        if on_card:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


def check(operator: str, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The operator's relative error on the device in this dtype, and what is allowed; the error may be NaN.

    Runs it through the backend that would serve it. The random state is left as it was, and whatever the caller has
    switched on (autocast, no_grad, hooks on saved tensors) is off.
    """

    def as_it_is(tensor: Tensor) -> Tensor:
        return tensor

    with (
        _random_state_of_its_own(device),
        torch.device(device),
        torch.autocast(device.type, enabled=False),
        torch.inference_mode(False),
        torch.enable_grad(),
        # Of hooks on saved tensors only the innermost are called; gradient checkpointing counts what its own see.
        torch.autograd.graph.saved_tensors_hooks(as_it_is, as_it_is),
    ):
        return _relative(*_CHECKS[operator](dtype)), _allowed(device, dtype)


def run(device: torch.device | str = "cpu") -> list[SelfTestResult]:
    """Checks every operator on the device in float32 and bfloat16 through the backend that would serve it.

    The worse of the two dtypes (error over what is allowed) is reported. The random state is left as it was.

    Raises:
        BackendError: ``ALETHEIA_BACKEND`` asks for a backend that cannot serve.
    """
    device = torch.device(device)
    results = []
    for operator in _CHECKS:
        start = time.perf_counter()
        found = [check(operator, device, dtype) for dtype in (torch.float32, torch.bfloat16)]
        error, allowed = max(found, key=lambda one: _badness(one[0] / one[1]))
        results.append(
            SelfTestResult(
                operator=operator,
                backend=backends.choose(operator, device, torch.bfloat16).backend,
                ok=error <= allowed,
                error=error,
                allowed=allowed,
                seconds=time.perf_counter() - start,
            )
        )
    return results
