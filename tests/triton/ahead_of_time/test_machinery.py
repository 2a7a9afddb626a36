"""What finds faults in compiled kernels finds planted ones."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from aletheia_kernels.triton.cards import CARDS
from aletheia_kernels.triton.launch import Launch, Options, Traffic
from tests.triton.ahead_of_time import budget, planted
from tests.triton.ahead_of_time.specialisation import specialise


def _launch(kernel: Any, tensors: dict[str, torch.Tensor], sizes: dict[str, int], **constants: Any) -> Launch:
    options = Options(constants.pop("num_warps", 4), constants.pop("num_stages", 3))
    return Launch(kernel, (8, 8), {**tensors, **sizes}, constants, options, Traffic(0, 0, 0))


def _product(
    dtype: torch.dtype = torch.bfloat16, inner: int = 4096, skip: int = 0, **constants: Any
) -> Launch:
    tensors = {
        "x": torch.empty(4096 * inner + skip, dtype=dtype, device="meta")[skip:],
        "w": torch.empty(512, inner, dtype=dtype, device="meta"),
        "y": torch.empty(4096, 512, dtype=dtype, device="meta"),
    }
    sizes = {"rows": 4096, "inner": inner, "columns": 512, "x_row": inner, "w_row": inner, "y_row": 512}
    return _launch(
        planted.product, tensors, sizes, **{"M": 128, "N": 128, "K": 64, "num_warps": 8} | constants
    )


def _compile(launch: Launch, card: str) -> budget.Compiled:
    return budget.compile_one(specialise(launch, CARDS[card]))


@pytest.mark.parametrize("card", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"])
def test_a_sound_kernel_obeys_every_rule(card):
    compiled = _compile(_product(num_stages=2 if card == "gfx942" else 3), card)
    assert budget.broken_rules(compiled) == []
    assert compiled.has_narrow_dot
    assert compiled.is_pipelined


@pytest.mark.parametrize(
    ("fault", "card", "rule"),
    [
        ({"M": 256, "N": 256, "num_warps": 4}, "sm_80", "spills"),
        ({"num_stages": 6}, "sm_120", "shared memory"),
        ({"M": 16, "N": 16, "K": 16, "num_warps": 1}, "sm_90", "wgmma"),
    ],
)
def test_a_configuration_that_does_not_suit_the_card_is_found(fault, card, rule):
    assert budget.broken_rules(_compile(_product(**fault), card)) == [rule]


@pytest.mark.parametrize("fault", [{"inner": 4095}, {"skip": 1}])
def test_what_is_not_divisible_by_16_is_compiled_apart(fault):
    sound, odd = specialise(_product(), CARDS["sm_90"]), specialise(_product(**fault), CARDS["sm_90"])
    assert sound.aligned
    assert not odd.aligned
    assert "not divisible: " + ("x" if "skip" in fault else "inner x_row w_row") in odd.configuration
    figures = budget.compile_one(odd).figures
    assert figures.asynchronous_copies < budget.compile_one(sound).figures.asynchronous_copies


def test_float32_is_multiplied_off_the_matrix_units():
    compiled = _compile(_product(torch.float32, M=64, N=64, K=32), "sm_90")
    assert not compiled.has_narrow_dot
    assert compiled.figures.tensor_core == ""


def _line(kernel: Any, text: str) -> str:
    source, first = inspect.getsourcelines(kernel.fn)
    (index,) = [index for index, line in enumerate(source) if text in line]
    return f"planted.py:{first + index}"


@pytest.mark.parametrize(
    ("kernel", "at"),
    [
        (planted.copy_in_32_bits, "offset = row"),
        (planted.copy_widened_too_late, "offset = (row * x_row)"),
        (planted.sum_rows_by_a_running_offset, "offset += row * x_row"),
        (planted.copy_by_tile, None),
    ],
)
def test_offsets_multiplied_in_32_bits_are_found_where_they_are_made(kernel, at):
    tensors = {name: torch.empty(4096, 4096, device="meta") for name in ("x", "y")}
    sizes = {"rows": 4096, "columns": 4096, "x_row": 4096, "y_row": 4096}
    names = [parameter.name for parameter in kernel.params]
    constants = {name: 16 for name in ("M", "N") if name in names}
    launch = _launch(
        kernel, tensors, {name: size for name, size in sizes.items() if name in names}, **constants
    )
    compiled = _compile(launch, "sm_90")
    assert list(compiled.narrow_products) == ([_line(kernel, at)] if at else [])
    assert ("64-bit offsets" in budget.broken_rules(compiled)) == bool(at)


def test_a_changed_figure_is_told_with_both_values():
    compiled = [_compile(_product(), "sm_90")]
    now = {"triton": budget.triton.__version__, "exemptions": [], "kernels": budget.as_kernels(compiled)}
    assert budget.differences(now, compiled) == []
    kernel, configuration, card = compiled[0].specialisation.key
    figures = now["kernels"][kernel][configuration][card]
    registers = figures["registers"]
    figures["registers"] += 8
    (line,) = budget.differences(now, compiled)
    assert line == f"product on sm_90 ({configuration}): registers {registers + 8} → {registers}"
    assert "no case launches it" in budget.differences(now, [])[0]
    assert "not in the budget" in budget.differences({**now, "kernels": {}}, compiled)[0]


def test_an_exemption_covers_its_rule_alone_and_must_be_needed():
    compiled = [_compile(_product(M=16, N=16, K=16, num_warps=1), "sm_90")]
    exemption = {
        "rule": "wgmma",
        "kernel": "product",
        "where": "M=16",
        "reason": "fewer rows than a warp group has",
    }
    assert len(budget.violations({"exemptions": []}, compiled)) == 1
    assert budget.violations({"exemptions": [exemption]}, compiled) == []
    (line,) = budget.violations({"exemptions": [exemption]}, [])
    assert line.startswith("nothing needs the exemption")
    assert len(budget.violations({"exemptions": [{**exemption, "where": "M=32"}]}, compiled)) == 2
