"""A check of every operator against the float64 reference, in seconds: what a user runs on a machine nobody tested."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import aletheia_kernels
from aletheia_kernels import backends, reference


@dataclass(frozen=True)
class SelfTestResult:
    """One operator's check: ``error`` and ``allowed`` are relative (RMS against float64), ``seconds`` wall-clock."""

    operator: str
    backend: str
    ok: bool
    error: float
    allowed: float
    seconds: float


def _relative(given: list[Tensor], expected: list[Tensor]) -> float:
    worst = 0.0
    for got, want in zip(given, expected, strict=True):
        scale = want.double().norm().item() or 1.0
        worst = max(worst, (got.double() - want.double()).norm().item() / scale)
    return worst


def _lora(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    x = torch.randn(61, 70).to(dtype)
    weights = [torch.randn(n, 70).div(8).to(dtype) for n in (65, 48)]
    biases = [torch.randn(65).to(dtype), None]
    lora_As = [torch.randn(r, 70).div(8).to(dtype) for r in (3, 20)]
    lora_Bs = [torch.randn(n, r).div(4).to(dtype) for n, r in ((65, 3), (48, 20))]
    dys = [torch.randn(61, n).to(dtype) for n in (65, 48)]
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


def _gated_mlp(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    shapes, ranks = [(65, 48), (65, 48), (30, 65)], (3, 20, 5)
    x, dy = torch.randn(70, 48).to(dtype), torch.randn(70, 30).to(dtype)
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


def _pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(150, 96).to(dtype), torch.randn(150, 130).to(dtype)


def _weight_norm(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    x, dy = _pair(dtype)
    expected = (dy.double().T @ x.double()).square().sum()
    given = [aletheia_kernels.weight_grad_norm_sq(x, dy, method=method) for method in ("tiles", "gram")]
    return given, [expected, expected]


def _sketch(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    x, dy = _pair(dtype)
    omega = torch.randn(96, 16).to(dtype)
    given = aletheia_kernels.weight_grad_norm_sq_sketch(x, dy, omega)
    return list(given), list(reference.weight_grad_norm_sq_sketch(x.double(), dy.double(), omega.double()))


def _embedding(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    _, dy = _pair(dtype)
    indices = torch.randint(0, 40, (150,))
    expected = torch.zeros(40, 130, dtype=torch.float64).index_add_(0, indices, dy.double()).square().sum()
    return [aletheia_kernels.embedding_grad_norm_sq(indices, dy)], [expected]


def _bias(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    _, dy = _pair(dtype)
    return [aletheia_kernels.bias_grad_norm_sq(dy)], [dy.double().sum(0).square().sum()]


def _cross_entropy(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    h, weight = torch.randn(37, 64).to(dtype), torch.randn(501, 64).div(4).to(dtype)
    labels = torch.randint(0, 501, (37,))
    leaf, wide = h.clone().requires_grad_(), h.double().requires_grad_()
    loss = aletheia_kernels.linear_cross_entropy(leaf, weight, labels)
    expected = torch.nn.functional.cross_entropy(wide @ weight.double().T, labels, reduction="sum")
    grads = torch.autograd.grad(loss, leaf) + torch.autograd.grad(expected, wide)
    return [loss.detach(), grads[0]], [expected.detach(), grads[1]]


def _attention(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
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


def _rms_norm(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
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


def _rotary(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
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
    "weight_grad_norm_sq": _weight_norm,
    "weight_grad_norm_sq_sketch": _sketch,
    "embedding_grad_norm_sq": _embedding,
    "bias_grad_norm_sq": _bias,
    "linear_cross_entropy": _cross_entropy,
    "range_attention": _attention,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
}
# Relative RMS error allowed: a few units in the last place of the dtype, for sums of a few hundred terms.
_ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def run() -> list[SelfTestResult]:
    """Checks every operator on CPU tensors in float32 and bfloat16 through the backend that would serve it.

    The worse of the two dtypes (error over what is allowed) is reported. The random state is left as it was.

    Raises:
        BackendError: ``ALETHEIA_BACKEND`` asks for a backend that cannot serve.
    """
    results = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for operator, check in _CHECKS.items():
            start = time.perf_counter()
            worst = (0.0, _ALLOWED[torch.float32])
            for dtype, allowed in _ALLOWED.items():
                error = _relative(*check(dtype))
                if not error <= allowed * worst[0] / worst[1]:  # also taken when error is NaN
                    worst = (error, allowed)
            results.append(
                SelfTestResult(
                    operator=operator,
                    backend=backends.choose(operator, "cpu", torch.bfloat16).backend,
                    ok=worst[0] <= worst[1],
                    error=worst[0],
                    allowed=worst[1],
                    seconds=time.perf_counter() - start,
                )
            )
    return results
