"""Every kernel is compiled for every card and held to the budget; nothing here runs one."""

from __future__ import annotations

import pytest
import triton

from tests.triton.ahead_of_time import budget
from tests.triton.ahead_of_time.cases import record
from tests.triton.ahead_of_time.conftest import COMPILED
from tests.triton.ahead_of_time.specialisation import specialisations


@pytest.fixture(scope="module")
def compiled(pytestconfig: pytest.Config) -> list[budget.Compiled]:
    result = budget.compile_cases()
    pytestconfig.stash[COMPILED] = budget.counts({"kernels": budget.as_kernels(result)})
    return result


def _none(lines: list[str], advice: str = "") -> None:
    if lines:
        pytest.fail("\n".join([*lines, advice]), pytrace=False)


def test_every_rule_is_obeyed(compiled):
    _none(budget.violations(budget.read(), compiled))


def test_every_figure_is_the_budgets(compiled):
    made_with = budget.read()["triton"]
    if made_with != triton.__version__:
        pytest.skip(f"the budget was made with triton {made_with}, and this is {triton.__version__}")
    advice = f"if the change is meant, write the budget anew and commit it with the change: {budget.COMMAND}"
    _none(budget.differences(budget.read(), compiled), advice)


def test_every_kernel_is_compiled(compiled):
    assert set(budget.kernels()) == {one.specialisation.kernel for one in compiled}


@pytest.mark.parametrize(("tokens", "others"), [(4096, 4093), (16, 1)])
def test_the_number_of_tokens_makes_nothing_new_to_compile(tokens, others):
    """Of two numbers that are alike in size and have one divided by 16 and one not, or one that is 1."""
    known = {one.key for one in specialisations(record(tokens))}
    _none([str(one.key) for one in specialisations(record(others)) if one.key not in known])


def test_the_table_in_the_docs_is_the_budgets():
    assert budget.TABLE.read_text() == budget.table(budget.read()), f"write it anew: {budget.COMMAND}"
