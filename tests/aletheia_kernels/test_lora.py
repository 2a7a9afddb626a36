"""lora_group equals its definition, forward and every gradient, in every backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aletheia_kernels import cpu, lora_group
from aletheia_kernels.backends import BackendError
from aletheia_kernels.reference import philox
from tests.layouts import every_other_column, transposed
from tests.lora_case import Case

# The reference, and the compiled operators on every instruction set that this processor offers.
CASES = ["reference", *(f"cpu-{name}" for name in cpu.offered_instruction_sets())]


@pytest.fixture(params=CASES)
def every_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    name, _, instruction_set = request.param.partition("-")
    monkeypatch.setenv("ALETHEIA_BACKEND", name)
    with cpu.forced_instruction_set(instruction_set) if instruction_set else nullcontext():
        yield


projections = st.lists(
    st.tuples(st.integers(1, 150), st.integers(1, 300), st.booleans()), min_size=1, max_size=4
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@settings(max_examples=25)
@given(
    tokens=st.integers(0, 130),
    in_features=st.integers(1, 200),
    group=projections,
    dropout_p=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**31),
)
@example(tokens=0, in_features=33, group=[(5, 1, True), (7, 300, False)], dropout_p=0.5, seed=0)
@example(tokens=1, in_features=1, group=[(1, 1, False)], dropout_p=0.0, seed=1)
@example(
    tokens=129, in_features=65, group=[(33, 8, True), (17, 64, False), (17, 16, False)], dropout_p=0.1, seed=2
)
def test_equals_the_definition(every_set, two_times_rule, dtype, tokens, in_features, group, dropout_p, seed):
    case = Case.draw(tokens, in_features, group, dtype, dropout_p, seed)
    ours, plain, exact = case.ours(), case.plain(dtype), case.plain(torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])


def test_wide_master_adapters_get_gradients_in_their_own_dtype(every_set, two_times_rule):
    case = Case.draw(64, 96, [(80, 8, True), (48, 64, False)], torch.bfloat16, dropout_p=0.1)
    ours = case.ours(adapters=torch.float32)
    plain, exact = case.plain(torch.bfloat16), case.plain(torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])
        assert ours[name].dtype == (torch.float32 if name[:2] in ("dA", "dB") else torch.bfloat16)


# More than two million weights, an inner dimension of more than a sweep, widths that end within a panel: columns go to
# threads, which pack what they need.
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_wide_weights(every_set, two_times_rule, dropout_p, transposed):
    case = Case.draw(67, 2083, [(1031, 5, True), (150, 19, False)], torch.bfloat16, dropout_p)
    plain, exact = case.plain(torch.bfloat16), case.plain(torch.float64)
    if transposed:
        case.weights = [w.T.contiguous().T for w in case.weights]
    ours = case.ours(adapters=torch.float32)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])


@pytest.mark.skipif(
    cpu.offered_instruction_sets()[-1:] in ((), ("default",), ("avx2",), ("avx512",)),
    reason="without AVX512-VNNI the base products are the vendor library's, whose sums follow the threads",
)
def test_wide_weights_do_not_depend_on_threads():
    case = Case.draw(300, 2083, [(1031, 5, True), (150, 19, False)], torch.bfloat16)
    results: dict[str, Tensor] = {}
    for threads in (2, 2, 1, 3):
        torch.set_num_threads(threads)
        given = case.ours(adapters=torch.float32)
        for name in ("y[0]", "y[1]", "dx"):
            assert torch.equal(results.setdefault(name, given[name]), given[name]), name


# Rows and widths for which wide registers pack a weight's columns before the product, and as they come to them.
@pytest.mark.parametrize("weight_layout", [transposed, every_other_column])
@pytest.mark.parametrize(("tokens", "width"), [(70, 48), (300, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_strided_operands(every_set, two_times_rule, dtype, tokens, width, weight_layout):
    case = Case.draw(tokens, width, [(width // 2, 5, True), (width + 8, 11, False)], dtype)
    plain, exact = case.plain(dtype), case.plain(torch.float64)
    case.x, case.dys = every_other_column(case.x), [every_other_column(dy) for dy in case.dys]
    case.weights = [weight_layout(w) for w in case.weights]
    case.lora_As = [every_other_column(a) for a in case.lora_As]
    case.lora_Bs = [transposed(b) for b in case.lora_Bs]
    n = len(case.weights)
    leaves = [t.detach().requires_grad_() for t in (case.x, *case.lora_As, *case.lora_Bs)]
    ys = lora_group(leaves[0], case.weights, case.biases, leaves[1 : 1 + n], leaves[1 + n :], case.scalings)
    ours = case.results(ys, leaves)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_one_thread_and_two_agree_and_a_run_repeats(two_times_rule, dropout_p):
    case = Case.draw(700, 64, [(96, 8, True), (33, 64, False), (64, 16, False)], torch.bfloat16, dropout_p)
    exact, plain = case.plain(torch.float64), case.plain(torch.bfloat16)
    results: dict[tuple[int, str], Tensor] = {}
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        given = case.ours(adapters=torch.float32)
        for name in exact:
            two_times_rule(name, given[name], plain[name], exact[name])
            again = results.setdefault((threads, name), given[name])
            assert torch.equal(again, given[name]), name
    for name in ("y[0]", "y[1]", "dx"):  # every row is summed by one thread, in one order
        assert torch.equal(results[1, name], results[2, name])


def test_leading_dimensions_are_kept(backend):
    case = Case.draw(24, 16, [(10, 3, False)], torch.float32)
    flat = lora_group(case.x, case.weights, [None], case.lora_As, case.lora_Bs, [1.0])[0]
    stacked = lora_group(case.x.view(2, 3, 4, 16), case.weights, [None], case.lora_As, case.lora_Bs, [1.0])[0]
    assert stacked.shape == (2, 3, 4, 10)
    assert torch.equal(stacked.view(24, 10), flat)


@pytest.mark.parametrize("shape", [(5, 0), (0, 4), (2, 0, 4), (4,)])
def test_any_dimension_may_be_empty_or_missing(backend, shape):
    features = shape[-1]
    bias = torch.arange(3.0)
    factors = [torch.ones(2, features)], [torch.ones(3, 2)]
    (y,) = lora_group(torch.ones(shape), [torch.ones(3, features)], [bias], *factors, [0.5])
    assert torch.equal(y, (bias + 2 * features).expand(*shape[:-1], 3))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(backend, dropout_p):
    case = Case.draw(5, 7, [(4, 2, True), (3, 3, False)], torch.float64, dropout_p)

    def run(x, a0, a1, b0, b1, bias):
        ys = lora_group(
            x,
            case.weights,
            [bias, None],
            [a0, a1],
            [b0, b1],
            case.scalings,
            dropout_p=dropout_p,
            seed=case.seed,
        )
        return tuple(ys)

    bias = case.biases[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (*case.leaves(torch.float64), bias))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck(backend, dtype, dropout_p):
    case = Case.draw(9, 12, [(6, 2, True), (5, 4, False)], dtype, dropout_p)
    leaves = case.leaves(dtype)
    args = (
        leaves[0],
        case.weights,
        case.biases,
        leaves[1:3],
        leaves[3:5],
        case.scalings,
        dropout_p,
        case.seed,
    )
    torch.library.opcheck(torch.ops.aletheia.lora_group.default, args)
    h = torch.randn(9, 6)
    args = (
        case.dys,
        case.x,
        h,
        case.weights,
        case.lora_As,
        case.lora_Bs,
        case.scalings,
        dropout_p,
        case.seed,
        True,
    )
    torch.library.opcheck(torch.ops.aletheia.lora_group_backward.default, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiles_as_one_graph(every_set, dtype):
    case = Case.draw(12, 16, [(8, 3, True), (10, 5, False)], dtype, dropout_p=0.2)

    def run(x, a0, a1, b0, b1):
        return lora_group(
            x, case.weights, case.biases, [a0, a1], [b0, b1], case.scalings, dropout_p=0.2, seed=case.seed
        )

    eager, compiled = case.leaves(dtype), case.leaves(dtype)
    expected = case.results(run(*eager), eager)
    given = case.results(torch.compile(run, fullgraph=True, backend="aot_eager")(*compiled), compiled)
    for name in expected:
        assert torch.equal(given[name], expected[name]), name


def test_a_compiled_call_serves_other_token_counts_without_recompiling(backend):
    case = Case.draw(64, 16, [(8, 3, True)], torch.float32)
    counter = torch._dynamo.testing.CompileCounter()

    def run(x):
        return lora_group(x, case.weights, case.biases, case.lora_As, case.lora_Bs, [1.0])[0]

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for tokens in (64, 48, 33, 57):
        x = case.x[:tokens].clone()
        assert torch.equal(compiled(x), run(x))
    assert counter.frame_count <= 2  # the first length, then one graph for every other


def test_dropout_depends_on_the_seed_alone_and_keeps_its_share(backend):
    eye, zero = torch.eye(256), torch.zeros(256, 256)
    x = torch.ones(400, 256)

    def dropped(seed: int) -> Tensor:
        return lora_group(x, [zero], [None], [eye], [eye], [1.0], dropout_p=0.25, seed=torch.tensor([seed]))[
            0
        ]

    first = dropped(11)
    assert torch.equal(first, dropped(11))
    assert not torch.equal(first, dropped(12))
    assert torch.equal(first.unique(), torch.tensor([0.0, 1.0 / 0.75]))
    share = (first == 0).double().mean().item()
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / first.numel()) ** 0.5


def test_philox_known_answers():
    # The published known-answer vector of Philox4x32-10 for an all-zero counter and key.
    words = philox.philox_words(torch.tensor([0]), 4)
    assert [f"{word:08x}" for word in words.tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_no_operand_is_written_to(every_set):
    case = Case.draw(20, 24, [(16, 4, True), (12, 7, True)], torch.float32, dropout_p=0.2)
    operands = [case.x, *case.weights, *case.biases, *case.lora_As, *case.lora_Bs, *case.dys, case.seed]
    before = [t.clone() for t in operands]
    leaves = [t.requires_grad_() for t in (case.x, *case.lora_As, *case.lora_Bs)]
    ys = lora_group(
        leaves[0],
        case.weights,
        case.biases,
        leaves[1:3],
        leaves[3:],
        case.scalings,
        dropout_p=0.2,
        seed=case.seed,
    )
    case.results(ys, leaves)
    for operand, expected in zip(operands, before, strict=True):
        assert torch.equal(operand.detach(), expected)


def test_input_that_needs_no_gradient_gets_none(backend):
    case = Case.draw(6, 8, [(4, 2, False)], torch.float32)
    a, b = case.lora_As[0].requires_grad_(), case.lora_Bs[0].requires_grad_()
    y = lora_group(case.x, case.weights, [None], [a], [b], [1.0])[0]
    y.backward(case.dys[0])
    assert case.x.grad is None
    assert a.grad is not None
    assert b.grad is not None


def test_autocast_does_not_reach_inside(backend):
    case = Case.draw(16, 32, [(24, 4, False)], torch.float32)
    expected = lora_group(case.x, case.weights, [None], case.lora_As, case.lora_Bs, [1.0])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = lora_group(case.x, case.weights, [None], case.lora_As, case.lora_Bs, [1.0])[0]
    assert torch.equal(given, expected)


BAD = {
    "x": (lambda c: setattr(c, "x", c.x[:, :-1]), r"weights\[0\]: expected \[out, 15\]"),
    "weight dtype": (
        lambda c: c.weights.__setitem__(1, c.weights[1].double()),
        r"weights\[1\]: expected x's dtype",
    ),
    "bias": (lambda c: c.biases.__setitem__(0, c.biases[0][:-1]), r"biases\[0\]: expected \[8\]"),
    "trained bias": (
        lambda c: c.biases.__setitem__(0, torch.zeros(1, requires_grad=True)),
        r"biases\[0\]: expected \[8\]",
    ),
    "trained bias of another dtype": (
        lambda c: c.biases.__setitem__(0, torch.zeros(8, dtype=torch.float64, requires_grad=True)),
        r"biases\[0\]: expected \[8\] torch.float32",
    ),
    "no dimension": (lambda c: setattr(c, "x", c.x[0, 0]), r"x: expected \[..., features\]"),
    "A": (lambda c: c.lora_As.__setitem__(0, c.lora_As[0].T), r"lora_As\[0\]: expected \[rank, 16\]"),
    "B": (lambda c: c.lora_Bs.__setitem__(1, c.lora_Bs[0]), r"lora_Bs\[1\]: expected \(10, 5\)"),
    "scalings": (lambda c: c.scalings.pop(), "expected one weight, bias, A, B and scaling a projection"),
    "dropout": (lambda c: setattr(c, "dropout_p", 1.0), "0 <= p < 1"),
    "trained weight": (lambda c: c.weights[0].requires_grad_(), "expected frozen weights"),
    "seed": (
        lambda c: (setattr(c, "dropout_p", 0.5), setattr(c, "seed", None)),
        "dropout needs an int64 seed",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_arguments_that_do_not_fit_are_named(backend, what):
    case = Case.draw(12, 16, [(8, 3, True), (10, 5, False)], torch.float32)
    spoil, message = BAD[what]
    spoil(case)
    with pytest.raises(RuntimeError, match=message):
        lora_group(
            case.x,
            case.weights,
            case.biases,
            case.lora_As,
            case.lora_Bs,
            case.scalings,
            dropout_p=case.dropout_p,
            seed=case.seed,
        )


def test_an_unmet_wish_for_a_backend_is_an_error(monkeypatch):
    case = Case.draw(4, 8, [(4, 2, False)], torch.float32)
    args = (case.x, case.weights, [None], case.lora_As, case.lora_Bs, [1.0])
    monkeypatch.setenv("ALETHEIA_BACKEND", "triton")
    with pytest.raises(BackendError, match="ALETHEIA_BACKEND=triton cannot serve lora_group: "):
        lora_group(*args)
    monkeypatch.setenv("ALETHEIA_BACKEND", "tirton")
    with pytest.raises(BackendError, match="names no backend: use one of reference, cpu, triton"):
        lora_group(*args)


def test_a_weight_that_a_function_makes_is_made_again_and_not_saved():
    torch.manual_seed(0)
    x = torch.randn(3, 8, requires_grad=True)
    weight, lora_A, lora_B = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    made = []

    def make() -> torch.Tensor:
        made.append(weight.clone())
        return made[-1]

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        (y,) = lora_group(x, [make], [None], [lora_A], [lora_B], [0.5])
    assert len(made) == 1
    assert weight.shape not in saved
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert len(made) == 2
    (expected,) = lora_group(x, [weight], [None], [lora_A], [lora_B], [0.5])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.square().sum(), x)[0])
