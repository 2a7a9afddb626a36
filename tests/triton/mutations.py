"""Plants the faults that an author of kernels makes, one at a time, and shows which tests notice.

    python tests/triton/mutations.py [--only NAME] [--write]

Each fault is a replacement of exact text in a copy of the package. The operator's tests under the interpreter, the
kernel's compilation for one card and the operator's contract are run on the copy. ``--write`` writes the table to
docs/kernel-mutations.md. Exits with 1 when a fault escapes all of them.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "kernel-mutations.md"
KERNELS = Path("aletheia_kernels") / "triton"
CARD = "sm_90"


@dataclass(frozen=True)
class Fault:
    """Replaces ``old``, found once in a function of a file, by ``new``; ``kernel`` is what is compiled again."""

    name: str
    file: str
    function: str
    operator: str
    old: str
    new: str
    kernel: str = ""

    def plant(self, package: Path) -> None:
        path = package / KERNELS / self.file
        lines = path.read_text().splitlines(keepends=True)
        (function,) = (
            node
            for node in ast.walk(ast.parse("".join(lines)))
            if isinstance(node, ast.FunctionDef) and node.name == self.function
        )
        place = slice(function.lineno - 1, function.end_lineno)
        body = "".join(lines[place])
        if body.count(self.old) != 1:
            raise SystemExit(
                f"{self.name}: expected once in {self.function}, found {body.count(self.old)} times: {self.old}"
            )
        lines[place] = [body.replace(self.old, self.new)]
        path.write_text("".join(lines))


FAULTS = (
    Fault(
        "a missing mask",
        "lora.py",
        "lora_shrink",
        "lora_group",
        "mask=here[:, None] & inside[None, :], other=0.0)",
        "mask=inside[None, :], other=0.0)",
    ),
    Fault("a wrong stride", "lora.py", "lora_dx", "lora_group", "* x_row", "* features"),
    Fault(
        "an offset in 32 bits",
        "lora.py",
        "lora_shrink",
        "lora_group",
        "rows.to(tl.int64) * x_row",
        "rows * x_row",
    ),
    Fault(
        "a dropped scale", "lora.py", "lora_expand", "lora_group", "picked(scalings, sibling) * acc", "acc"
    ),
    Fault(
        "a skipped last tile",
        "grad_norm.py",
        "tile_sums",
        "weight_grad_norm_sq",
        "range(0, tokens, BLOCK_T)",
        "range(0, tokens - BLOCK_T + 1, BLOCK_T)",
    ),
    Fault(
        "another dropout mask in backward",
        "lora.py",
        "lora_dx",
        "lora_group",
        "keep_tile(seed, rows, first_column,",
        "keep_tile(seed, rows - begin, first_column,",
    ),
    Fault(
        "a leak of ranks that an expert does not have",
        "experts.py",
        "grouped_copy",
        "lora_experts",
        "tl.where(r < own, read.to(tl.float32), 0.0)",
        "read.to(tl.float32)",
    ),
    Fault(
        "an accumulator that nobody cleared",
        "grad_norm.py",
        "_norms",
        "weight_grad_norm_sq",
        "trusted = torch.zeros(",
        "trusted = torch.empty(",
        kernel="tile_sums",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """Whether each lane notices; the compiled lane by a rule, or only by figures that differ from the budget's."""

    interpreter: bool
    rule: str
    figures: bool
    contract: bool

    @property
    def caught(self) -> bool:
        return self.interpreter or bool(self.rule) or self.figures or self.contract


def _run(copy: Path, *command: str, interpreted: bool) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{copy / 'python'}", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = (sys.executable, "-m", *command)
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


def _fails(done: subprocess.CompletedProcess[str]) -> bool:
    # pytest: 0 all passed, 1 some failed. A signal, too, is a notice: what writes out of bounds may end the process.
    if done.returncode in (2, 3, 4, 5):
        raise SystemExit(f"the tests did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.returncode != 0


def try_fault(fault: Fault, copy: Path, planted: bool) -> Verdict:
    """Runs the tests that concern the fault's kernel on a copy of the package, with the fault or without it."""
    for folder in ("aletheia_kernels", "tests", "python"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    if planted:
        fault.plant(copy)
    operators = f"tests/triton/operators/test_{fault.file}"
    interpreted = _run(copy, "pytest", "-x", operators, interpreted=True)
    contract = ("tests/triton/contract/test_contract.py", "-k", fault.operator)
    traced = _run(copy, "pytest", "-x", *contract, interpreted=True)
    kernel = ("--kernel", fault.kernel or fault.function, "--card", CARD)
    compiled = _run(copy, "tests.triton.ahead_of_time.budget", *kernel, interpreted=False)
    if " compiled: " not in compiled.stdout:
        raise SystemExit(f"nothing was compiled:\n{compiled.stdout[-3000:]}{compiled.stderr[-3000:]}")
    rules = {line.split("'")[1] for line in compiled.stdout.splitlines() if " breaks '" in line}
    return Verdict(_fails(interpreted), ", ".join(sorted(rules)), " → " in compiled.stdout, _fails(traced))


def _on_a_copy(fault: Fault, *, planted: bool) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        return try_fault(fault, Path(folder), planted)


def _table(verdicts: dict[Fault, Verdict]) -> str:
    lines = [
        "# Faults planted in the kernels, and which tests notice",
        "",
        "Made by `make mutations` (`tests/triton/mutations.py`): each fault is planted in a copy of the package,",
        "and the tests that concern its operator are run on the copy. *Interpreted*: the operator's tests under",
        "Triton's interpreter. *Compiled*: the kernel compiled for sm_90 breaks a rule, or has other figures than its",
        "budget (which shows that something changed, not that it is wrong). *Traced*: opcheck, fakes and graphs.",
        "",
        "| fault | planted in | interpreted | compiled | traced |",
        "|---|---|---|---|---|",
    ]
    for fault, verdict in verdicts.items():
        compiled = f"rule: {verdict.rule}" if verdict.rule else "figures" if verdict.figures else "–"
        lines.append(
            f"| {fault.name} | `{fault.function}`: `{fault.old}` → `{fault.new}` |"
            f" {'noticed' if verdict.interpreter else '–'} | {compiled} | {'noticed' if verdict.contract else '–'} |"
        )
    caught = sum(verdict.caught for verdict in verdicts.values())
    return "\n".join([*lines, "", f"{caught} of {len(verdicts)} are noticed.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME", help="plant this fault alone")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    wish = parser.parse_args()
    verdicts = {}
    sound = set()
    for fault in FAULTS:
        if wish.only not in (None, fault.name):
            continue
        if (fault.file, fault.operator) not in sound:
            # What fails without the fault as well says nothing of the fault.
            verdict = _on_a_copy(fault, planted=False)
            if verdict.caught:
                raise SystemExit(f"the tests of {fault.operator} fail without a fault: {verdict}")
            sound.add((fault.file, fault.operator))
        verdicts[fault] = _on_a_copy(fault, planted=True)
        print(f"{fault.name}: {verdicts[fault]}", flush=True)
    table = _table(verdicts)
    print(table)
    if wish.write:
        PAGE.write_text(table)
    return 0 if verdicts and all(verdict.caught for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
