"""Which parts of this package serve which family of models, and why not the others.

Every family is a small random model (`family_table.py`) that goes the whole way: probe, plan, adapters, operators, 20
steps beside stock PEFT, saved, loaded by stock PEFT, restored. A cell is true, or the reason in a few words.

    python benchmarks/families.py --json families.json --write docs/families.md
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aletheia_tune.errors import UserError
from aletheia_tune.head import labelled_head
from aletheia_tune.kernels import use_kernels
from aletheia_tune.layers import find_layers
from aletheia_tune.patch import PatchEntry, PatchReport, apply_kernels
from aletheia_tune.plan import uniform_plan
from aletheia_tune.prefix import cut_prefix
from aletheia_tune.prefix_cache import cache_prefix
from aletheia_tune.probe import probe
from benchmarks.family_table import FAMILIES, Batch, Family

COLUMNS = (
    "probe exact",
    "all projections on the fast path",
    "siblings found",
    "head on the fast path",
    "prefix cut",
    "prefix cached",
    "experts",
    "parity",
)
STEPS = 20
RANK = 4
Cell = bool | str


def _batches(family: Family, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [family.batch(generator) for _ in range(count)]


def _without_labels(batch: Batch) -> Batch:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _adapted(family: Family, layers: range | None = None) -> PeftModel:
    model = family.build()
    plan = uniform_plan(model, rank=RANK, layers=layers, targets=family.targets)
    torch.manual_seed(1)
    return get_peft_model(model, plan.to_lora_config(model))


def probe_exact(family: Family) -> Cell:
    """The score of every layer against the gradients that autograd holds."""
    model = family.build()
    batches = _batches(family, 2)
    scores = probe(model, batches)
    found = find_layers(model)
    expected = [0.0] * len(found.layers)
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for index, layer in enumerate(found.layers):
            expected[index] += sum(float(p.grad.norm()) for p in layer.parameters() if p.grad is not None)
    off = max(abs(mine / theirs - 1) for mine, theirs in zip(scores.layers, expected, strict=True))
    return True if off < 1e-3 else f"off by {off:.1e}"


def _is_expert(model: Any, entry: PatchEntry) -> bool:
    return hasattr(model.get_submodule(entry.module), "parameter_name")


def _reasons(entries: list[PatchEntry]) -> Cell:
    slow = [entry for entry in entries if entry.path != "kernel"]
    reasons = sorted({entry.reason for entry in slow})
    return True if not slow else f"{len(slow)} of {len(entries)} on PEFT's path: {'; '.join(reasons)}"


def patched(family: Family) -> dict[str, Cell]:
    """What `apply_kernels` reports."""
    model = _adapted(family)
    report: PatchReport = apply_kernels(model, example_inputs=_without_labels(_batches(family, 1)[0]))
    experts = [entry for entry in report.entries if _is_expert(model, entry)]
    projections = [entry for entry in report.entries if entry not in experts]
    siblings = any(len(entry.siblings) > 1 for entry in projections)
    fast = _reasons(projections)
    if fast is True and family.left_out is not None:
        fast = family.left_out
    return {
        "all projections on the fast path": fast,
        "siblings found": siblings or "no two linears read the same tensor",
        "experts": _reasons(experts) if experts else "none",
    }


def head_on_the_fast_path(family: Family) -> Cell:
    with labelled_head(_adapted(family)) as head:
        return head.active or str(head.reason)


def prefix_cut(family: Family) -> Cell:
    """Layers under the adapters keep no graph, although their input is made to require a gradient."""
    model = _adapted(family, range(1, 2))
    cut = cut_prefix(model)
    if cut.lowest_layer is None:
        return cut.reason
    seen: list[bool] = []

    def note(_module: Any, _arguments: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    find_layers(model).layers[0].register_forward_hook(note)
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    model(**_batches(family, 1)[0]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return seen == [False] or "its layers keep a graph"


def prefix_cached(family: Family) -> Cell:
    """A second pass over the same examples reads what the first one kept, and comes to the same loss."""
    model = _adapted(family, range(1, 2))
    batch = _batches(family, 1)[0]
    with tempfile.TemporaryDirectory() as directory:
        cut = cut_prefix(model)
        cache = cache_prefix(model, cut, directory)
        if cache.reason:
            return cache.reason
        with cache:
            losses = [model(**batch).loss.item() for _ in range(2)]
        if cache.hits == 0:
            return "no example is recognised"
        return abs(losses[0] - losses[1]) < 1e-6 * abs(losses[0]) or "another loss from the kept prefix"


def _train(model: PeftModel, batches: list[Batch]) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _output(model: Any, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def parity(family: Family) -> Cell:
    """The losses of 20 steps beside stock PEFT's; then saved, loaded by stock PEFT, and restored."""
    ours, theirs = _adapted(family), _adapted(family)
    batches = _batches(family, 4)
    with use_kernels(ours, example_inputs=_without_labels(batches[0])):
        losses = _train(ours, batches)
    expected = _train(theirs, batches)
    again = STEPS - STEPS % len(batches) - len(batches)  # the first batch, later on
    if not abs(expected[again] - expected[0]) > 1e-2 * expected[0]:
        return "its losses do not move"
    off = max(abs(mine - other) / abs(other) for mine, other in zip(losses, expected, strict=True))
    if off > 1e-3:
        return f"losses differ by {off:.1e}"
    with tempfile.TemporaryDirectory() as directory:
        ours.save_pretrained(directory, save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(family.build(), directory)
    mine, other = _output(ours, batches[0]), _output(loaded, batches[0])
    apart = float((mine - other).abs().max() / other.abs().max())
    return apart < 1e-5 or f"stock PEFT's load is {apart:.1e} off"


def examine(family: Family) -> dict[str, Cell]:
    """The family's row."""
    checks: dict[str, Callable[[Family], Cell]] = {
        "probe exact": probe_exact,
        "head on the fast path": head_on_the_fast_path,
        "prefix cut": prefix_cut,
        "prefix cached": prefix_cached,
        "parity": parity,
    }
    cells: dict[str, Cell] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for column, check in checks.items():
            cells[column] = _cell(check, family)
        try:
            cells.update(patched(family))
        except UserError as error:
            cells.update(dict.fromkeys((column for column in COLUMNS if column not in cells), str(error)))
    return {column: cells[column] for column in COLUMNS}


def _cell(check: Callable[[Family], Cell], family: Family) -> Cell:
    try:
        return check(family)
    except UserError as error:
        return str(error)


def markdown(rows: dict[str, dict[str, Cell]]) -> str:
    """The page: a table of ticks and numbers, and under it the reason behind each number."""
    reasons: list[str] = []

    def cell(value: Cell) -> str:
        if value is True:
            return "✓"
        text = re.sub(r"[|\n]+", " ", str(value))
        if text == "none":
            return "–"
        if text not in reasons:
            reasons.append(text)
        return f"({reasons.index(text) + 1})"

    lines = [
        "# Families of models",
        "",
        "Made by `python benchmarks/families.py --write docs/families.md`; every row is a test. Small random models of",
        "each architecture go from probe to plan, adapters, operators, 20 steps beside stock PEFT in float32 (losses",
        "within 1e-3), saving, loading by stock PEFT, and back to its forwards. ✓ means that it holds; a number is a",
        "reason below; – means that there is nothing of the kind.",
        "",
        f"| family | {' | '.join(COLUMNS)} |",
        f"|---|{'---|' * len(COLUMNS)}",
    ]
    lines += [
        f"| {name} | {' | '.join(cell(cells[column]) for column in COLUMNS)} |"
        for name, cells in rows.items()
    ]
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="of the table; all by default")
    parser.add_argument("--json", type=Path, help="writes families.NAME.COLUMN")
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    strays = [name for name in options.families if name not in FAMILIES]
    if strays:
        parser.error(f"no family {strays[0]!r}; there are {', '.join(FAMILIES)}")
    rows = {}
    for name in options.families or FAMILIES:
        rows[name] = examine(FAMILIES[name])
        print(name, json.dumps(rows[name], ensure_ascii=False), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"families": rows}, indent=1) + "\n", encoding="utf-8")
    if options.write:
        options.write.write_text(markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
