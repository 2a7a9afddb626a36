"""Which parts of this package serve which family of models, and why not the others.

Every family is a small random model (`family_table.py`) that goes the whole way: probe, plan, adapters, operators, 20
steps beside stock PEFT, restored, saved, loaded by stock PEFT. A cell is true, or the reason in a few words.

    python benchmarks/families.py --json benchmarks/results/families.json --write docs/families.md
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
from aletheia_lora import gradient_probe
from peft import PeftModel, get_peft_model
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aletheia_tune.errors import UserError
from aletheia_tune.head import labelled_head
from aletheia_tune.kernels import use_kernels
from aletheia_tune.layers import find_layers
from aletheia_tune.patch import PatchEntry, PatchReport, apply_kernels
from aletheia_tune.plan import make_plan
from aletheia_tune.prefix import cut_prefix
from aletheia_tune.prefix_cache import cache_prefix
from aletheia_tune.probe import faithful_batches, probe
from aletheia_tune.scores import Scores
from benchmarks import family_table
from benchmarks.family_table import BEYOND_FLOAT16, FAMILIES, Batch, Family

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
# Relative, in float32. On an AVX-512 processor scores are within 2e-7, and losses within 4e-7 for all but GPT-2, where
# AdamW makes 9e-6 in 20 steps of gradients that are as near to float64's as PEFT's are.
PROBE_TOLERANCE = 1e-5
PARITY_TOLERANCE = 1e-4
# Relative to float32; bfloat16 weights, of 8 binary digits, come to 6e-3.
HALF_TOLERANCE = 2e-2
HALF_PRECISION = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Cell = bool | str


def _batches(family: Family, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [family.batch(generator) for _ in range(count)]


def _adapted(
    family: Family, scores: Scores, control: str | None = None, dtype: torch.dtype = torch.float32
) -> PeftModel:
    """Adapters on every layer, or on half of them as `control` chooses, in float32 on weights of any dtype."""
    model = family.build().to(dtype)
    share = 100 if control is None else 50
    plan = make_plan(scores, layers=share, control=control, rank=RANK, targets=family.targets)
    torch.manual_seed(1)
    return get_peft_model(model, plan.to_lora_config(model))


def probe_exact(family: Family, scores: Scores) -> Cell:
    """The score of every layer and module against the gradients that autograd holds."""
    model = family.build()
    layers, tensors = find_layers(model).layers, dict(model.named_parameters())
    weights = {name: tensors.get(f"{name}.weight", tensors.get(name)) for name in scores.modules}
    by_layer, by_module = [0.0] * len(layers), dict.fromkeys(weights, 0.0)
    for batch in _batches(family, 2):
        model.zero_grad()
        model(**batch).loss.backward()
        for index, layer in enumerate(layers):
            by_layer[index] += sum(float(p.grad.norm()) for p in layer.parameters() if p.grad is not None)
        for name, weight in weights.items():
            by_module[name] += 0.0 if weight is None or weight.grad is None else float(weight.grad.norm())
    pairs = [*zip(scores.layers, by_layer, strict=True)]
    pairs += [(scores.modules[name].score, expected) for name, expected in by_module.items()]
    # Beside the largest: a gradient that vanishes in exact arithmetic (of a key's bias) is rounding in both.
    floor = 1e-6 * max(by_layer)
    off = max(abs(mine - theirs) / max(theirs, floor) for mine, theirs in pairs)
    return off < PROBE_TOLERANCE or f"off by {off:.1e}"


def _is_expert(model: Any, entry: PatchEntry) -> bool:
    return hasattr(model.get_submodule(entry.module), "parameter_name")


def _reasons(entries: list[PatchEntry]) -> Cell:
    slow = [entry for entry in entries if entry.path != "kernel"]
    reasons = sorted({entry.reason for entry in slow})
    return True if not slow else f"{len(slow)} of {len(entries)} on PEFT's path: {'; '.join(reasons)}"


def patched(family: Family, scores: Scores) -> dict[str, Cell]:
    """What `apply_kernels` reports."""
    model = _adapted(family, scores)
    report: PatchReport = apply_kernels(model, example_inputs=_batches(family, 1)[0])
    experts = [entry for entry in report.entries if _is_expert(model, entry)]
    projections = [entry for entry in report.entries if entry not in experts]
    siblings = any(len(entry.siblings) > 1 for entry in projections)
    fast = _reasons(projections)
    if fast is True and family.left_out is not None:
        fast = family.left_out
    return {
        "all projections on the fast path": fast,
        "siblings found": siblings or "no two linears of one module read the same tensor",
        "experts": _reasons(experts) if experts else "none",
    }


def head_on_the_fast_path(family: Family, scores: Scores) -> Cell:
    with labelled_head(_adapted(family, scores)) as head:
        return head.active or str(head.reason)


def prefix_cut(family: Family, scores: Scores) -> Cell:
    """Layers under the adapters keep no graph, although their input is made to require a gradient."""
    model = _adapted(family, scores, "top")
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


def prefix_cached(family: Family, scores: Scores) -> Cell:
    """A second pass over the same examples reads what the first one kept, and comes to the same loss."""
    model = _adapted(family, scores, "top")
    batch = _batches(family, 1)[0]
    with tempfile.TemporaryDirectory() as directory:
        cut = cut_prefix(model)
        cache = cache_prefix(model, cut, directory)
        if cache.reason:
            return cache.reason
        with cache:
            losses = [model(**batch).loss.item() for _ in range(2)]
        if cache.hits == 0:
            return cache.passed_by_reason
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


def _off(losses: list[float], expected: list[float]) -> float:
    return max(abs(mine - other) / abs(other) for mine, other in zip(losses, expected, strict=True))


def _output(model: Any, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def parity(family: Family, scores: Scores) -> Cell:
    """The losses of 20 steps beside stock PEFT's; then restored, saved, and loaded by stock PEFT."""
    ours, theirs = _adapted(family, scores), _adapted(family, scores)
    batches = _batches(family, 4)
    with use_kernels(ours, example_inputs=batches[0]):
        losses = _train(ours, batches)
    expected = _train(theirs, batches)
    again = STEPS - STEPS % len(batches) - len(batches)  # the first batch, later on
    if not abs(expected[again] - expected[0]) > 1e-2 * expected[0]:
        return "its losses do not move"
    if (off := _off(losses, expected)) > PARITY_TOLERANCE:
        return f"losses differ by {off:.1e}"
    with tempfile.TemporaryDirectory() as directory:
        ours.save_pretrained(directory, save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(family.build(), directory)
    # Both are stock PEFT now, of the same weights: not a bit may differ.
    same = torch.equal(_output(ours, batches[0]), _output(loaded, batches[0]))
    return same or "stock PEFT's load computes something else"


def examine(family: Family) -> dict[str, Cell]:
    """The family's row."""
    checks: dict[str, Callable[[Family, Scores], Cell]] = {
        "probe exact": probe_exact,
        "head on the fast path": head_on_the_fast_path,
        "prefix cut": prefix_cut,
        "prefix cached": prefix_cached,
        "parity": parity,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scores = probe(family.build(), _batches(family, 2))
            cells = {column: check(family, scores) for column, check in checks.items()}
            cells |= patched(family, scores)
        except UserError as error:
            return dict.fromkeys(COLUMNS, str(error))
    return {column: cells[column] for column in COLUMNS}


def half_precision(dtype: torch.dtype) -> dict[str, Cell]:
    """The published probe and this package's on gradients beyond float16's range; 20 steps on ordinary ones."""
    generator = torch.Generator().manual_seed(0)
    rows = [family_table.text(generator) for _ in range(6)]
    examples = [{key: batch[key][0] for key in ("input_ids", "attention_mask")} for batch in rows]

    def ours(in_dtype: torch.dtype) -> Tensor:
        model = BEYOND_FLOAT16.build().to(in_dtype)
        return torch.tensor(probe(model, faithful_batches(examples), faithful=True).layers)

    wide = ours(torch.float32)

    def judged(layers: Tensor) -> Cell:
        if not layers.isfinite().all():
            return "not finite"
        off = float((layers / wide - 1).abs().max())
        return off < HALF_TOLERANCE or f"off by {off:.1e}"

    model = BEYOND_FLOAT16.build().to(dtype)
    published = gradient_probe(model, examples, len(wide), device=torch.device("cpu"))
    family = FAMILIES["GPT-NeoX"]
    scores, batches = probe(family.build().to(dtype), _batches(family, 2)), _batches(family, 4)
    with use_kernels(adapted := _adapted(family, scores, dtype=dtype), example_inputs=batches[0]):
        losses = torch.tensor(_train(adapted, batches))
    expected = torch.tensor(_train(_adapted(family, scores), batches))
    steps: Cell = "not finite"
    if losses.isfinite().all():
        off = _off(losses.tolist(), expected.tolist())
        steps = off < HALF_TOLERANCE or f"losses off by {off:.1e}"
    return {
        "published probe": judged(torch.tensor([published[index] for index in range(len(wide))])),
        "this probe": judged(ours(dtype)),
        f"{STEPS} steps": steps,
    }


def markdown(rows: dict[str, dict[str, Cell]], halves: dict[str, dict[str, Cell]]) -> str:
    """The page: tables of ticks and numbers, and under them the reason behind each number."""
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

    def table(corner: str, rows: dict[str, dict[str, Cell]]) -> list[str]:
        columns = list(next(iter(rows.values())))
        lines = [f"| {corner} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        return lines + [
            f"| {name} | {' | '.join(map(cell, cells.values()))} |" for name, cells in rows.items()
        ]

    lines = [
        "# Families of models",
        "",
        "Made by `python benchmarks/families.py --write docs/families.md`; every row is a test. Small random models of",
        "each architecture go from probe to plan, adapters, operators, 20 steps beside stock PEFT in float32, back to",
        "PEFT's forwards, saving, and loading by stock PEFT. ✓ means that it holds; a number is a reason at the end; –",
        "means that there is nothing of the kind. *Probe exact*: the score of every layer and module is the sum of the",
        f"gradient norms that autograd holds, within {PROBE_TOLERANCE:g}. *Parity*: the loss of every step within",
        f"{PARITY_TOLERANCE:g} of stock PEFT's, and not a bit between the restored model and stock PEFT's load of it.",
        "",
        *table("family", rows),
        "",
        "## GPT-NeoX in half precision",
        "",
        "The probes are on a model whose gradients leave float16's range although its loss does not, made so by its",
        "weights (`BEYOND_FLOAT16` in `benchmarks/family_table.py`): the published probe, aletheia-lora 0.1.2, on the",
        "model in each dtype, and this package's, which in float16 scales the loss. ✓ means layer scores, and in the",
        f"last column losses of 20 steps on the ordinary model, within {HALF_TOLERANCE:.0%} of float32's.",
        "",
        *table("dtype", halves),
        "",
    ]
    lines += [*(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="of the table; all by default, and half precision")
    parser.add_argument(
        "--json", type=Path, help="writes families.NAME.COLUMN and half_precision.DTYPE.COLUMN"
    )
    parser.add_argument("--write", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    strays = [name for name in options.families if name not in FAMILIES]
    if strays:
        parser.error(f"no family {strays[0]!r}; there are {', '.join(FAMILIES)}")
    if options.families and (options.json or options.write):
        parser.error("files are written of all families together: name none")
    rows = {}
    for name in options.families or FAMILIES:
        rows[name] = examine(FAMILIES[name])
        print(name, json.dumps(rows[name], ensure_ascii=False), flush=True)
    if options.families:
        return
    halves = {}
    for name, dtype in HALF_PRECISION.items():
        halves[name] = half_precision(dtype)
        print(name, json.dumps(halves[name], ensure_ascii=False), flush=True)
    if options.json:
        results = {"families": rows, "half_precision": halves}
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.write:
        options.write.write_text(markdown(rows, halves), encoding="utf-8")


if __name__ == "__main__":
    main()
