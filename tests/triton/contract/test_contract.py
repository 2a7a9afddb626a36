"""Schema, fake, autograd and graph of every operator that Triton serves, interpreted, or traced for a card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from aletheia_kernels import triton
from tests.triton.contract.calls import calls

OPERATORS = sorted(triton.SERVED)
# Of these, arguments besides the inputs go by the number of tokens.
PER_TOKEN_BESIDES = ("embedding_grad_norm_sq", "lora_experts", "weight_grad_norm_sq_per_example")
DIFFERENTIABLE = [name for name, call in calls("cpu").items() if call.backward]


def _operator(name: str) -> Any:
    return getattr(torch.ops.aletheia, name).default


def _capture(graphs: list[torch.fx.GraphModule]) -> Callable[..., Any]:
    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)


def _ours(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph.graph.nodes if str(node.target).startswith("aletheia.")]


def test_every_operator_is_called_here():
    assert set(calls("cpu")) == set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    call = calls("cpu")[name]
    needing = tree_map_only(
        torch.Tensor,
        lambda t: t.clone().requires_grad_() if any(t is one for one in call.inputs) and call.backward else t,
        call.arguments,
    )
    torch.library.opcheck(_operator(name), needing)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_of_the_backward(name):
    call = calls("cpu")[name]
    torch.library.opcheck(_operator(f"{name}_backward"), call.backward(_operator(name)(*call.arguments)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATORS)
def test_fakes_on_a_card_have_the_form_of_what_is_computed(name, dtype):
    def outputs(device: str) -> list[torch.Tensor]:
        call = calls(device, dtype)[name]
        forward = _operator(name)(*call.arguments)
        backward = _operator(f"{name}_backward")(*call.backward(forward)) if call.backward else ()
        return tree_leaves((forward, backward))

    with FakeTensorMode():
        fakes = outputs("cuda")
    for fake, computed in zip(fakes, outputs("cpu"), strict=True):
        assert fake.device.type == "cuda"
        assert (fake.shape, fake.dtype, fake.stride()) == (computed.shape, computed.dtype, computed.stride())


@pytest.mark.parametrize("name", OPERATORS)
def test_a_call_on_a_card_is_one_graph(name):
    """Traced with fake CUDA tensors. Autograd's engine wants a real card, so gradients are traced in the next test."""
    graphs: list[torch.fx.GraphModule] = []
    torch.compiler.reset()
    with FakeTensorMode(), torch.no_grad():
        call = calls("cuda", torch.bfloat16)[name]
        outputs = torch.compile(call.public, backend=_capture(graphs), fullgraph=True)(*call.inputs)
    (graph,) = graphs
    (node,) = _ours(graph)
    assert node.target == _operator(name)
    assert all(output.device.type == "cuda" for output in tree_leaves(outputs))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_and_backward_are_one_graph_each_and_compute_what_eager_does(name):
    def run(function: Callable[..., Any]) -> list[torch.Tensor]:
        leaves = [one.clone().requires_grad_() for one in call.inputs]
        outputs = tree_leaves(function(*leaves))
        return [*outputs, *torch.autograd.grad([output.square().sum() for output in outputs], leaves)]

    call = calls("cpu")[name]
    graphs: list[torch.fx.GraphModule] = []
    torch.compiler.reset()
    traced = run(torch.compile(call.public, backend=_capture(graphs), fullgraph=True))
    forward, backward = graphs
    assert [node.target for node in _ours(forward)] == [_operator(name)]
    assert [node.target for node in _ours(backward)] == [_operator(f"{name}_backward")]
    for one, other in zip(traced, run(call.public), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in PER_TOKEN_BESIDES])
def test_another_number_of_tokens_is_the_same_graph(name):
    graphs: list[torch.fx.GraphModule] = []
    torch.compiler.reset()
    call = calls("cpu")[name]
    tokens = call.inputs[0].shape[0]
    compiled = torch.compile(call.public, backend=_capture(graphs), fullgraph=True, dynamic=True)
    # All are kept alive: a graph is dropped with the tensors it was made for.
    inputs = [
        [one[:extent].clone() if one.shape[0] == tokens else one for one in call.inputs]
        for extent in (tokens, tokens - 1, 3)
    ]
    with torch.no_grad():
        for given in inputs:
            compiled(*given)
    assert len(graphs) == 1
