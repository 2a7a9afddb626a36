"""What the operator benchmarks share: two implementations that must agree before either is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from aletheia_kernels import cpu, tune_allocator
from benchmarks.agreement import assert_agree

Outputs = Callable[[], Sequence[Tensor]]


@pytest.fixture(scope="session", autouse=True)
def allocator() -> None:
    tune_allocator()


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["features"] = cpu.features()


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """Times one pass (forward, backward or full) of the implementation that is asked for."""

    def run(
        implementations: dict[str, Outputs],
        name: str,
        which: str,
        leaves: Sequence[Tensor],
        upstream: Sequence[Tensor],
    ) -> None:
        def backward(outputs: Sequence[Tensor]) -> Sequence[Tensor]:
            return torch.autograd.grad(outputs, leaves, upstream, retain_graph=which == "backward")

        results = []
        for function in implementations.values():
            outputs = function()
            results.append([output.detach() for output in outputs] + list(backward(outputs)))
        assert_agree(*results)
        function = implementations[name]
        if which == "forward":
            with torch.no_grad():
                benchmark(function)
        elif which == "backward":
            benchmark(backward, function())
        else:
            benchmark(lambda: backward(function()))

    return run
