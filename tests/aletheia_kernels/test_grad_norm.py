"""Norms of weight gradients equal those of the gradients themselves, which are never held."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aletheia_kernels import (
    bias_grad_norm_sq,
    embedding_grad_norm_sq,
    weight_grad_norm_sq,
    weight_grad_norm_sq_per_example,
    weight_grad_norm_sq_sketch,
    weight_grad_norms_sq,
)
from aletheia_kernels.reference import grad_norm

SETTINGS = settings(max_examples=25)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
@pytest.mark.parametrize("method", ["tiles", "gram", "auto"])
@SETTINGS
@given(
    tokens=st.integers(0, 1100),
    in_features=st.integers(1, 130),
    out=st.integers(1, 150),
    seed=st.integers(0, 999),
)
@example(tokens=513, in_features=129, out=3, seed=0)
def test_weight_norm(backend, two_times_rule, dtype, method, tokens, in_features, out, seed):
    x, dy = draw(tokens, in_features, dtype=dtype, seed=seed), draw(tokens, out, dtype=dtype, seed=seed + 1)
    given_norm = weight_grad_norm_sq(x, dy, method=method)
    assert given_norm.dtype == torch.float32
    plain, exact = (dy.T @ x).float().square().sum(), (dy.double().T @ x.double()).square().sum()
    if method == "gram":
        # What the form cannot help: cancellation among its terms, which "auto" is there to notice.
        terms = (x.double() @ x.double().T) * (dy.double() @ dy.double().T)
        noise = grad_norm.GRAM_NOISE_UNITS * torch.finfo(torch.float32).eps * terms.norm()
        if (given_norm - exact).abs() <= noise:
            return
    two_times_rule(method, given_norm, plain, exact)


@DTYPES
def test_many_tiles_and_cancelling_gram_entries(backend, two_times_rule, dtype):
    # dy alternates in sign from token to token, so that the Gram sum is a small difference of large terms: the Gram
    # form is the cheaper one here and float32 cannot carry it, which "auto" must notice.
    x = draw(1, 700, dtype=dtype).expand(600, 700) + draw(600, 700, dtype=dtype, seed=1) / 16
    dy = draw(1, 900, dtype=dtype, seed=2) * torch.tensor([1.0, -1.0]).to(dtype).repeat(300)[:, None]
    exact = (dy.double().T @ x.double()).square().sum()
    plain = (dy.T @ x).float().square().sum()
    for method in ("tiles", "auto"):
        two_times_rule(method, weight_grad_norm_sq(x, dy, method=method), plain, exact)
    assert grad_norm.gram_is_cheaper(600, 700, 900, 4)


@DTYPES
def test_leading_dimensions_and_strides(backend, dtype):
    x, dy = draw(3, 8, 10, dtype=dtype), draw(3, 8, 20, dtype=dtype, seed=1)
    expected = weight_grad_norm_sq(x.reshape(24, 10), dy.reshape(24, 20))
    strided_x = x.transpose(1, 2).contiguous().transpose(1, 2)
    strided_dy = torch.stack((dy, dy), dim=-1)[..., 0]
    for method in ("tiles", "gram"):
        torch.testing.assert_close(
            weight_grad_norm_sq(strided_x, strided_dy, method=method), expected, rtol=1e-2, atol=0
        )


@DTYPES
def test_norms_of_many_linears(backend, two_times_rule, dtype):
    x = draw(60, 48, dtype=dtype)
    xs = [x, x, draw(7, 130, dtype=dtype, seed=1), draw(0, 5, dtype=dtype)]
    dys = [draw(len(x), n, dtype=dtype, seed=n) for x, n in zip(xs, (20, 90, 33, 3), strict=True)]
    norms = weight_grad_norms_sq([xs[0].view(6, 10, 48), *xs[1:]], [dys[0].view(6, 10, 20), *dys[1:]])
    assert norms.shape == (4,)
    assert norms.dtype == torch.float32
    for ours, x, dy in zip(norms, xs, dys, strict=True):
        exact, plain = (dy.double().T @ x.double()).square().sum(), (dy.T @ x).float().square().sum()
        two_times_rule("norm", ours, plain, exact)


@DTYPES
@pytest.mark.parametrize("shape", [(3, 20, 40, 50), (2, 100, 9, 7), (2, 0, 9, 7), (0, 4, 9, 7)])
def test_norms_of_single_examples(backend, two_times_rule, dtype, shape):
    batch, tokens, in_features, out = shape
    x, dy = draw(batch, tokens, in_features, dtype=dtype), draw(batch, tokens, out, dtype=dtype, seed=1)
    norms = weight_grad_norm_sq_per_example(x, dy)
    assert norms.shape == (batch,)
    assert norms.dtype == torch.float32
    for ours, x_b, dy_b in zip(norms, x, dy, strict=True):
        exact, plain = (dy_b.double().T @ x_b.double()).square().sum(), (dy_b.T @ x_b).float().square().sum()
        two_times_rule("norm", ours, plain, exact)


def test_examples_are_those_of_autograd(backend):
    linear = torch.nn.Linear(6, 5, bias=False)
    x = torch.randn(4, 3, 2, 6, generator=torch.Generator().manual_seed(0))
    y = linear(x)
    dy = torch.autograd.grad(y.square().sum(), y)[0]
    for b, norm in enumerate(weight_grad_norm_sq_per_example(x, dy)):
        (gradient,) = torch.autograd.grad(linear(x[b]).square().sum(), linear.weight)
        torch.testing.assert_close(norm, gradient.square().sum())


@DTYPES
@SETTINGS
@given(tokens=st.integers(0, 300), dim=st.integers(1, 90), rows=st.integers(1, 40), seed=st.integers(0, 999))
def test_embedding_and_bias_norms(backend, two_times_rule, dtype, tokens, dim, rows, seed):
    dy = draw(tokens, dim, dtype=dtype, seed=seed)
    indices = torch.randint(0, rows, (tokens,), generator=torch.Generator().manual_seed(seed))

    def gradient(as_dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(rows, dim, dtype=as_dtype).index_add_(0, indices, dy.to(as_dtype))

    exact, plain = gradient(torch.float64).square().sum(), gradient(dtype).float().square().sum()
    two_times_rule("embedding", embedding_grad_norm_sq(indices, dy), plain, exact)
    plain = dy.sum(0).float().square().sum()
    two_times_rule("bias", bias_grad_norm_sq(dy), plain, dy.double().sum(0).square().sum())


@DTYPES
def test_sketch_is_unbiased_and_knows_its_error(backend, dtype):
    x, dy = draw(64, 80, dtype=dtype), draw(64, 96, dtype=dtype, seed=1)
    exact = (dy.double().T @ x.double()).square().sum().item()
    generator = torch.Generator().manual_seed(5)
    draws = [weight_grad_norm_sq_sketch(x, dy, torch.randn(80, 16, generator=generator)) for _ in range(400)]
    estimates = torch.stack([estimate for estimate, _ in draws]).double()
    errors = torch.stack([error for _, error in draws]).double()
    spread = estimates.std().item()
    assert abs(estimates.mean().item() - exact) < 4 * spread / 400**0.5
    assert 0.8 < errors.square().mean().sqrt().item() / spread < 1.25


def test_sketch_equals_the_reference(backend, two_times_rule):
    x, dy, omega = (
        draw(70, 33, dtype=torch.bfloat16),
        draw(70, 65, dtype=torch.bfloat16, seed=1),
        torch.randn(33, 300),
    )
    omega = omega.bfloat16()
    plain = (dy.T @ (x @ omega)).float().square().sum(0)
    exact = (dy.double().T @ (x.double() @ omega.double())).square().sum(0)
    estimate, error = weight_grad_norm_sq_sketch(x, dy, omega)
    two_times_rule("estimate", estimate, plain.mean(), exact.mean())
    two_times_rule("error", error, plain.std() / 300**0.5, exact.std() / 300**0.5)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("method", ["tiles", "gram"])
def test_the_gradient_is_never_held(monkeypatch, method):
    # The reference's own operations are visible to a dispatch mode; the C++ form tiles likewise (csrc/grad_norm.cpp).
    monkeypatch.setenv("ALETHEIA_BACKEND", "reference")
    from aletheia_kernels import reference

    x, dy = torch.randn(64, 1024), torch.randn(64, 2048)
    with LargestTensor() as seen:
        reference.weight_grad_norm_sq(x, dy, method)
    assert seen.elements < 1024 * 2048 / 4


@DTYPES
def test_operator_contract(backend, dtype):
    x, dy = draw(24, 10, dtype=dtype), draw(24, 12, dtype=dtype, seed=1)
    ops = torch.ops.aletheia
    torch.library.opcheck(ops.weight_grad_norm_sq.default, (x, dy, "auto"))
    torch.library.opcheck(ops.weight_grad_norms_sq.default, ([x, x[:5]], [dy, dy[:5]]))
    torch.library.opcheck(
        ops.weight_grad_norm_sq_per_example.default, (x.view(2, 12, 10), dy.view(2, 12, 12))
    )
    torch.library.opcheck(ops.weight_grad_norm_sq_sketch.default, (x, dy, draw(10, 4, dtype=dtype)))
    torch.library.opcheck(ops.embedding_grad_norm_sq.default, (torch.arange(24) % 5, dy))
    torch.library.opcheck(ops.bias_grad_norm_sq.default, (dy,))

    def run(x, dy):
        sketch, _ = weight_grad_norm_sq_sketch(x, dy, torch.ones(10, 2, dtype=dtype))
        indices = torch.arange(24) % 5
        return (
            weight_grad_norm_sq(x, dy),
            sketch,
            embedding_grad_norm_sq(indices, dy),
            bias_grad_norm_sq(dy),
            weight_grad_norms_sq([x, x], [dy, x]),
            weight_grad_norm_sq_per_example(x.view(2, 12, 10), dy.view(2, 12, 12)),
        )

    for given_norm, expected in zip(
        torch.compile(run, fullgraph=True, backend="aot_eager")(x, dy), run(x, dy), strict=True
    ):
        assert torch.equal(given_norm, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, dy: weight_grad_norm_sq(x[:-1], dy), "x \\[tokens, in\\] and dy \\[tokens, out\\]"),
        (lambda x, dy: weight_grad_norm_sq(x.double(), dy), "one floating dtype"),
        (lambda x, dy: weight_grad_norm_sq(x, dy, method="fast"), "one of auto, tiles, gram"),
        (lambda x, dy: weight_grad_norm_sq_sketch(x, dy, torch.ones(10, 1)), "at least 2"),
        (
            lambda x, dy: weight_grad_norms_sq([x], [dy, dy]),
            "one dy for every x and at least one, got 1 and 2",
        ),
        (lambda x, dy: weight_grad_norms_sq([], []), "at least one"),
        (lambda x, dy: weight_grad_norms_sq([x, x.double()], [dy, dy.double()]), "float32 on cpu throughout"),
        (lambda x, dy: weight_grad_norm_sq_per_example(x, dy[:-1]), "x \\[batch, tokens, in\\] and dy"),
        (lambda x, dy: weight_grad_norm_sq_per_example(x[0], dy), "x \\[batch, tokens, in\\] and dy"),
        (lambda x, dy: weight_grad_norm_sq_per_example(x, dy.double()), "one floating dtype"),
        (lambda x, dy: embedding_grad_norm_sq(torch.arange(5), dy), "indices \\[tokens\\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(backend, call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.randn(24, 10), torch.randn(24, 12))
