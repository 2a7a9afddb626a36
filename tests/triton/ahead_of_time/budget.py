"""The kernels' budget: every configuration compiled for every card, its figures, and the rules they obey.

    python -m tests.triton.ahead_of_time.budget            compile, and say what differs from the budget
    python -m tests.triton.ahead_of_time.budget --write    write budget.json and docs/kernel-budget.md anew

Exits with 1 when a rule is broken or a figure differs. The exemptions from rules stand in budget.json.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

import aletheia_kernels.triton
from aletheia_kernels.triton.cards import CARDS
from tests.triton.ahead_of_time.cases import record
from tests.triton.ahead_of_time.machine_code import Figures, figures
from tests.triton.ahead_of_time.offsets import narrow_products
from tests.triton.ahead_of_time.specialisation import Specialisation, specialisations

ROOT = Path(__file__).resolve().parents[3]
FILE = Path(__file__).with_name("budget.json")
TABLE = ROOT / "docs" / "kernel-budget.md"
# The figures under the names that the table gives them.
COLUMNS = {
    "registers": "registers",
    "shared_memory": "shared memory",
    "spills": "spills",
    "tensor_core": "matrix instructions",
    "asynchronous_copies": "asynchronous copies",
    "wide_accesses": "16-byte accesses",
}
COMMAND = "python -m tests.triton.ahead_of_time.budget --write"


@dataclass(frozen=True)
class Compiled:
    """One specialisation's machine code, and what its Triton IR says of the source."""

    specialisation: Specialisation
    figures: Figures
    narrow_products: tuple[str, ...]
    has_narrow_dot: bool
    is_pipelined: bool


def compile_one(specialisation: Specialisation) -> Compiled:
    # Triton's cache is keyed by the source and all that the compiler is told: it saves time and hides no change.
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    kernel = specialisation.compile()
    ttir = str(kernel.asm["ttir"])
    stages = dict(specialisation.options)["num_stages"]
    return Compiled(
        specialisation,
        figures(kernel),
        tuple(narrow_products(ttir)),
        # Matrix units multiply bfloat16 and float16; float32 is multiplied exactly, on the ordinary ones.
        has_narrow_dot=bool(re.search(r"tt\.dot .*xb?f16>", ttir)),
        is_pipelined=stages > 1 and _loads_and_multiplies_in_a_loop(ttir),
    )


def _loads_and_multiplies_in_a_loop(ttir: str) -> bool:
    depth, loops = 0, []
    for line in ttir.splitlines():
        body = line.partition(" loc(")[0].strip()
        if "scf.for" in body and body.endswith("{"):
            loops.append((depth, set()))
        for _, held in loops:
            held.update(op for op in ("tt.load", "tt.dot") if f" = {op} " in body)
        depth += body.endswith("{") - body.startswith("}")
        while loops and depth <= loops[-1][0]:
            if len(loops.pop()[1]) == 2:
                return True
    return False


def compile_all(wanted: Sequence[Specialisation]) -> list[Compiled]:
    """Compiles on two processes; Triton's own import takes longer than a third would save.

    Raises:
        RuntimeError: naming every specialisation that does not compile, those included that take the compiler down.
    """
    compiled: dict[Specialisation, Compiled] = {}
    failures = []
    remaining = list(wanted)
    while remaining:
        together, remaining = remaining, []
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {one: pool.submit(compile_one, one) for one in together}
            for one, future in futures.items():
                try:
                    compiled[one] = future.result()
                except BrokenProcessPool:
                    remaining.append(one)
                except Exception as error:
                    failures.append(f"{' / '.join(one.key)}: {error}")
        if remaining:
            # One of the first two took its process, and with it the pool, down.
            suspects, remaining = remaining[:2], remaining[2:]
            for one in suspects:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    try:
                        compiled[one] = pool.submit(compile_one, one).result()
                    except BrokenProcessPool:
                        failures.append(f"{' / '.join(one.key)}: the compiler crashed")
    if failures:
        raise RuntimeError("\n".join(failures))
    return [compiled[one] for one in wanted]


def compile_cases() -> list[Compiled]:
    """Everything that the cases launch, for every card they name."""
    return compile_all(specialisations(record()))


def kernels() -> set[str]:
    """The names of the package's ``@triton.jit`` functions that no other one calls: those that are launched."""
    defined, called = set(), set()
    for file in Path(aletheia_kernels.triton.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(d) for d in function.decorator_list
            ):
                defined.add(function.name)
                calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
                called |= {node.id for node in calls if isinstance(node, ast.Name)}
    return defined - called


RULES = {
    "spills": "no thread moves its own values to memory",
    "shared memory": "a program fits the card",
    "tensor cores": "a dot of bfloat16 or float16 runs on the matrix units",
    "wgmma": "and on sm_90 in whole warp groups",
    "asynchronous copies": "where all is divisible by 16, loads in a loop for a dot pass the registers by (NVIDIA)",
    "16-byte accesses": "where all is divisible by 16, memory is accessed 16 bytes a thread",
    "64-bit offsets": "no two run-time numbers are multiplied in 32 bits for an address",
}


def broken_rules(compiled: Compiled) -> list[str]:
    """The names in RULES that these figures do not obey."""
    card, aligned, found = compiled.specialisation.card, compiled.specialisation.aligned, compiled.figures
    must_copy = compiled.is_pipelined and aligned and card.backend == "cuda"
    obeyed = {
        "spills": found.spills == 0,
        "shared memory": found.shared_memory <= card.shared_memory,
        "tensor cores": not compiled.has_narrow_dot or bool(found.tensor_core),
        "wgmma": not compiled.has_narrow_dot or card.name != "sm_90" or "GMMA" in found.tensor_core,
        "asynchronous copies": not must_copy or found.asynchronous_copies > 0,
        "16-byte accesses": not aligned or found.wide_accesses > 0,
        "64-bit offsets": not compiled.narrow_products,
    }
    return [rule for rule in RULES if not obeyed[rule]]


@dataclass(frozen=True)
class Exemption:
    """Why a rule need not be obeyed: for the kernel's configurations and cards whose text holds ``where``."""

    rule: str
    kernel: str
    where: str
    reason: str

    def covers(self, rule: str, specialisation: Specialisation) -> bool:
        kernel, configuration, card = specialisation.key
        return (self.rule, self.kernel) == (rule, kernel) and self.where in f"{configuration}; {card}"


def read() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def exemptions(budget: Mapping[str, Any]) -> list[Exemption]:
    return [Exemption(**entry) for entry in budget["exemptions"]]


def violations(budget: Mapping[str, Any], compiled: Sequence[Compiled]) -> list[str]:
    """Every rule that a kernel breaks without an exemption, with where; and every exemption that nothing needs."""
    exempt = exemptions(budget)
    broken: dict[str, list[str]] = {}
    needed = set()
    for one in compiled:
        kernel, configuration, card = one.specialisation.key
        for rule in broken_rules(one):
            covering = [exemption for exemption in exempt if exemption.covers(rule, one.specialisation)]
            needed.update(covering)
            if not covering:
                at = f" at {', '.join(one.narrow_products)}" if rule == "64-bit offsets" else ""
                broken.setdefault(f"{kernel} breaks '{rule}'{at}: {RULES[rule]}", []).append(
                    f"\n    {card} ({configuration})"
                )
    lines = [heading + "".join(places) for heading, places in broken.items()]
    return lines + [
        f"nothing needs the exemption {exemption}" for exemption in exempt if exemption not in needed
    ]


def as_kernels(compiled: Iterable[Compiled]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """kernel -> configuration -> card -> figures, sorted."""
    kernels: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for one in sorted(
        compiled,
        key=lambda one: (*one.specialisation.key[:2], list(CARDS).index(one.specialisation.card.name)),
    ):
        kernel, configuration, card = one.specialisation.key
        kernels.setdefault(kernel, {}).setdefault(configuration, {})[card] = asdict(one.figures)
    return kernels


def differences(
    budget: Mapping[str, Any],
    compiled: Sequence[Compiled],
    wanted: Callable[[tuple[str, str, str]], bool] = lambda key: True,
) -> list[str]:
    """One line for every figure that is not the budget's (as far as that is ``wanted``): kernel, card, old → new."""
    if budget["triton"] != triton.__version__:
        return [f"the budget was made with triton {budget['triton']}, this is {triton.__version__}"]
    old, new = _flat(budget["kernels"]), _flat(as_kernels(compiled))
    lines = []
    for key in [*filter(wanted, old), *(key for key in new if key not in old)]:
        kernel, configuration, card = key
        where = f"{kernel} on {card} ({configuration})"
        if key not in new:
            lines.append(f"{where}: in the budget, but no case launches it")
        elif key not in old:
            lines.append(f"{where}: launched, but not in the budget")
        else:
            lines += [
                f"{where}: {name} {old[key][name]!r} → {value!r}"
                for name, value in new[key].items()
                if old[key].get(name) != value
            ]
    return lines


def _flat(kernels: Mapping[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {
        (kernel, configuration, card): found
        for kernel, configurations in kernels.items()
        for configuration, cards in configurations.items()
        for card, found in cards.items()
    }


def counts(budget: Mapping[str, Any]) -> str:
    flat = _flat(budget["kernels"])
    configurations = {key[:2] for key in flat}
    cards = {key[2] for key in flat}
    return (
        f"{len(flat)} compiled: {len(budget['kernels'])} kernels, {len(configurations)} configurations of them,"
        f" {len(cards)} targets"
    )


def table(budget: Mapping[str, Any]) -> str:
    """docs/kernel-budget.md."""
    lines = [
        "# What every kernel takes of a card",
        "",
        f"Compiled with triton {budget['triton']} and no card, from the launches of representative calls",
        "(`tests/triton/ahead_of_time/cases.py`), and counted in the machine code. Nothing here was timed. `make test`",
        f"compiles all of it again and fails where a figure is not this one; `{COMMAND}`",
        "writes this page and the budget anew.",
        "",
        f"{counts(budget)}.",
        "",
        *(f"- *{rule}*: {meaning}." for rule, meaning in RULES.items()),
        "",
    ]
    if budget["exemptions"]:
        lines += ["Exempt, each for its reason:", ""]
        for exemption in exemptions(budget):
            where = f" where {exemption.where}" if exemption.where else ""
            lines.append(f"- `{exemption.kernel}`{where}, {exemption.rule}: {exemption.reason}")
        lines.append("")
    heads = ("configuration", "target", *COLUMNS.values())
    for kernel, configurations in budget["kernels"].items():
        lines += [f"## `{kernel}`", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for configuration, cards in configurations.items():
            first = configuration
            for card, found in cards.items():
                cells = (
                    f"{found[name]:,}" if name != "tensor_core" else found[name] or "none" for name in COLUMNS
                )
                lines.append(f"| {first} | {card} | {' | '.join(cells)} |")
                first = ""
        lines.append("")
    return "\n".join(lines)


def _text(budget: Mapping[str, Any]) -> str:
    """JSON with the figures of one card on one line, so that a change of the file shows one line a card."""
    text = json.dumps(budget, indent=1, ensure_ascii=False)
    return (
        re.sub(
            r'\{\s+("registers"[^}]*?)\s+\}', lambda found: "{" + re.sub(r"\s+", " ", found[1]) + "}", text
        )
        + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the budget and its table anew")
    parser.add_argument("--kernel", help="look at this kernel alone")
    parser.add_argument("--card", help="look at this card alone")
    wish = parser.parse_args()
    if wish.write and (wish.kernel or wish.card):
        parser.error("--write writes the whole budget")

    def wanted(key: tuple[str, str, str]) -> bool:
        return wish.kernel in (None, key[0]) and wish.card in (None, key[2])

    budget = read() if FILE.exists() else {"triton": triton.__version__, "exemptions": [], "kernels": {}}
    compiled = compile_all([one for one in specialisations(record()) if wanted(one.key)])
    findings = violations(budget, compiled)
    if wish.kernel or wish.card:
        findings = [finding for finding in findings if not finding.startswith("nothing needs")]
    if wish.write:
        budget = {**budget, "triton": triton.__version__, "kernels": as_kernels(compiled)}
        FILE.write_text(_text(budget))
        TABLE.write_text(table(budget))
    else:
        findings += differences(budget, compiled, wanted)
    print("\n".join([*findings, counts({"kernels": as_kernels(compiled)})]))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
