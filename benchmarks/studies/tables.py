"""Tables of docs/studies.md from the verdicts under benchmarks/studies/results.

    python benchmarks/studies/tables.py runs/races/gsm8k          # keeps that verdict under results, then as below
    python benchmarks/studies/tables.py                           # writes the tables of all kept verdicts anew

Every figure is read from the raw points. Intervals are those of Student's t over the seeds, 95 %, of the difference
that is named: with three seeds they are wide, and say so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from aletheia_tune import figures
from aletheia_tune.environment import machine_facts
from aletheia_tune.plan import highest_layers
from aletheia_tune.scores.gradient import spearman

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "studies.md"
# Two-sided 95 % quantile of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

# A task whose rates are searched and whose seeds are not run.
SEARCH = "aletheia-search"

# A task whose seeds are run and whose runs at equal time are not.
SEEDS = "aletheia-seeds"

# How many batches a probe needs: probe_batches.py.
PROBE = "aletheia-probe-batches"

# Of the machine's description, what stands under a table.
MACHINE = ("processor", "CPUs, threads", "torch")

Verdict = dict[str, Any]


def keep(run: Path) -> Path:
    """Copies a task's verdict, a single race, or the seeds or else the rates of a task that has none, to the results.

    The report of each patched module is left out, and of paths what only this machine has.
    """
    found = [path for path in (run / "verdict.json", run / "race.json") if path.is_file()]
    if found:
        content = json.loads(found[0].read_text(encoding="utf-8"))
        if content["format"] == PROBE:
            return _write(run.name, content)
    else:
        content = _unfinished(run)
    races = (
        [race for of in content["races"].values() for race in of.values()]
        if "races" in content
        else [content]
    )
    for race in races:
        for meta in (race["meta"], *(arm["plan"]["meta"] for arm in race["arms"])):
            meta.update({what: from_root(meta[what]) for what in ("model", "train", "eval") if what in meta})
        for arm in race["arms"]:
            if arm["training"]["patch_report"]:
                summary = arm["training"]["patch_report"]["summary"]
                arm["training"]["patch_report"] = {"summary": summary, "modules": []}
    return _write(run.name, content)


def _unfinished(run: Path) -> Verdict:
    """What a task without a verdict has: its seeds, or the search of its rates."""
    seeds = {
        found[1]: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(run.glob("seed-*/race.json"))
        if (found := re.fullmatch(r"seed-(\d+)-[0-9a-f]+", path.parent.name))
    }
    searched = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.glob("rate-*/race.json"))]
    arms = [arm for race in (seeds.values() if seeds else searched) for arm in race["arms"]]
    facts = dict(machine_facts())
    facts["CPUs, threads"] = (
        f"{os.cpu_count()} logical CPUs, {arms[0]['training']['config']['threads']} torch threads"
    )
    if not seeds:
        return {"format": SEARCH, "machine": facts, "races": {"search": dict(enumerate(searched))}}
    return {
        "format": SEEDS,
        "machine": facts,
        "chosen": {arm["name"]: arm["training"]["config"]["learning_rate"] for arm in arms},
        "arms": {},
        "table": {
            arm["name"]: {
                "peak_memory_mb": max(
                    a["training"]["peak_memory_mb"] for a in arms if a["name"] == arm["name"]
                )
            }
            for arm in arms
        },
        "races": {seed: {"race": race} for seed, race in seeds.items()},
    }


def _write(name: str, content: Verdict) -> Path:
    place = RESULTS / f"{name}.json"
    place.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    return place


def from_root(path: str) -> str:
    """The path from the root of this checkout; the name alone of what lies outside."""
    place = Path(os.path.abspath(path))
    return place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else place.name


def interval(values: Sequence[float]) -> str:
    """Mean and half-width of the 95 % interval of a mean."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.4f}"
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:+.4f} ± {half:.4f}"


def arms(verdict: Verdict, name: str) -> list[dict[str, Any]]:
    """The arm's runs, one a seed, in the order of the seeds."""
    found = [
        arm for races in verdict["races"].values() for arm in races["race"]["arms"] if arm["name"] == name
    ]
    assert len(found) == len(verdict["races"])
    return found


def loss(arm: dict[str, Any]) -> float:
    return float(arm["training"]["eval_loss_after"])


def accuracy(arm: dict[str, Any]) -> float:
    return float(arm["training"]["eval_accuracy_after"])


def start(arm: dict[str, Any]) -> float:
    """Seconds of the arm's probe, plan and patching."""
    return float(arm["plan_seconds"] + arm["training"]["setup_seconds"])


def seconds(arm: dict[str, Any]) -> float:
    """Of the arm's whole training, probe, plan and patching with it."""
    return start(arm) + float(arm["training"]["history"][-1]["seconds"])


def names(verdict: Verdict) -> list[str]:
    return [arm["name"] for arm in next(iter(verdict["races"].values()))["race"]["arms"]]


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [row(header), f"|---|{'---:|' * (len(header) - 1)}", *map(row, rows)]


def time_to_target(verdict: Verdict) -> list[str]:
    """Every challenger beside the baseline: times, losses and forgetting, seed by seed."""
    rows = []
    for name in names(verdict):
        runs, found = arms(verdict, name), list(verdict["arms"].get(name, {}).values())
        forgetting = [
            run["perplexity_after"] / run["perplexity_before"] for run in runs if run["perplexity_before"]
        ]

        def each(values: Sequence[float | None], digits: int) -> str:
            if all(value is None for value in values):
                return "–"
            return ", ".join("–" if value is None else f"{value:.{digits}f}" for value in values)

        rows.append(
            (
                name,
                f"{verdict['chosen'][name]:g}",
                each([loss(run) for run in runs], 4),
                each([seconds(run) for run in runs], 0),
                each([one["ratio_time_to_target"] for one in found], 3),
                each([one["ratio_after_first_step"] for one in found], 3),
                each([one["loss_equal_time"] for one in found], 4),
                each(forgetting, 3),
                f"{verdict['table'][name]['peak_memory_mb']:,.0f}",
            )
        )
    header = (
        "arm", "rate", "held-out loss", "seconds in all", "time to PEFT's loss, × PEFT's", "first steps left out",
        "loss at equal time", "forgetting", "peak MiB",
    )  # fmt: skip
    return table(header, rows)


def evaluated_on_the_way(verdict: Verdict) -> bool:
    """Whether any arm has a curve, and not its beginning and end alone."""
    return any(
        len(arm["training"]["evals"]) > 2
        for races in verdict["races"].values()
        for arm in races["race"]["arms"]
    )


def picture(verdict: Verdict) -> str:
    """Held-out loss over time of the first seed, as SVG: the race, and the runs at equal time.

    The latter got as many steps as fit in PEFT's time at their pace in the race, and are drawn at that pace: nothing
    ran beside them that would have slowed both arms alike, so that their own clock says nothing.
    """
    seed, races = next(iter(verdict["races"].items()))
    base, *others = races["race"]["arms"]
    # Where there are more than can be told apart, those that end lowest.
    lowest = sorted(others, key=loss)[: figures.MOST_CURVES - 1 - len(races["equal_time"]["arms"])]
    curves = []
    for arm in (base, *(arm for arm in others if arm in lowest)):
        evals = arm["training"]["evals"]
        curves.append(
            figures.Curve(
                arm["name"], [start(arm) + one["seconds"] for one in evals], [one["loss"] for one in evals]
            )
        )
    for arm in races["equal_time"]["arms"]:
        raced = next(one for one in others if one["name"] == arm["name"])
        pace = statistics.fmean(one["step_seconds"] for one in raced["training"]["history"])
        evals = arm["training"]["evals"]
        curves.append(
            figures.Curve(
                f"{arm['name']}, for PEFT's time",
                [start(raced) + one["step"] * pace for one in evals],
                [one["loss"] for one in evals],
            )
        )
    return figures.standalone(
        figures.loss_curves(
            curves,
            x_label="seconds, probe and patching included",
            y_label="held-out loss (nats a token)",
            label=f"Held-out loss by time, seed {seed}",
            target=verdict["arms"][verdict["recommended"]][seed]["target"],
        )
    )


def one_race(race: dict[str, Any]) -> list[str]:
    """A single race: its first arm sets the target."""
    base = race["arms"][0]
    rows = []
    for arm in race["arms"]:
        training = arm["training"]
        reached = [start(arm) + one["seconds"] for one in training["evals"] if one["loss"] <= loss(base)]
        rows.append(
            (
                arm["name"],
                f"{training['config']['learning_rate']:g}",
                f"{loss(arm):.4f}",
                f"{seconds(arm):.0f}",
                f"{reached[0] / seconds(base):.3f}" if reached else "–",
                f"{arm['perplexity_after'] / arm['perplexity_before']:.3f}"
                if arm["perplexity_before"]
                else "–",
                f"{training['peak_memory_mb']:,.0f}",
            )
        )
    header = (
        "arm",
        "rate",
        "held-out loss",
        "seconds in all",
        "time to the first's loss, × its",
        "forgetting",
        "peak MiB",
    )
    return table(header, rows)


def selection(verdict: Verdict, everything: str = "all layers") -> list[str]:
    """Every way to choose layers: where it ended, beside all layers and in PEFT's time, and what it took."""
    base = arms(verdict, everything)
    classifies = base[0]["training"].get("eval_accuracy_after") is not None
    rows = []
    for name in sorted(names(verdict), key=lambda name: statistics.fmean(map(loss, arms(verdict, name)))):
        runs = arms(verdict, name)
        layers = adapted_layers(runs[0])
        equal_time = [one["loss_equal_time"] for one in verdict["arms"].get(name, {}).values()]
        differences = [loss(mine) - loss(theirs) for mine, theirs in zip(runs, base, strict=True)]
        pace = statistics.median(
            record["step_seconds"] for run in runs for record in run["training"]["history"]
        )
        rows.append(
            (
                name,
                f"{verdict['chosen'][name]:g}",
                " ".join(_ranges(layers)),
                f"{statistics.fmean(map(loss, runs)):.4f}",
                *((f"{statistics.fmean(map(accuracy, runs)):.3f}",) if classifies else ()),
                "–" if name == everything else interval(differences),
                f"{statistics.fmean(equal_time):.4f}" if equal_time and None not in equal_time else "–",
                f"{statistics.fmean(run['plan_seconds'] for run in runs):.1f}",
                f"{pace:.3f}",
                f"{statistics.fmean(map(seconds, runs)):.0f}",
                f"{verdict['table'][name]['peak_memory_mb']:,.0f}",
            )
        )
    header = (
        "layers chosen by", "rate", "which (seed 0)", "held-out loss, mean",
        *(("accuracy, mean",) if classifies else ()), f"less that of {everything}",
        "at equal time, mean", "probe s", "s a step", "seconds in all", "peak MiB",
    )  # fmt: skip
    return table(header, rows)


def search(content: dict[str, Any]) -> list[str]:
    """One seed of every arm at each rate of its search. It has no times: what is compared is where runs end."""
    runs: dict[str, dict[float, dict[str, Any]]] = {}
    for race in content["races"]["search"].values():
        (arm,) = race["arms"]
        runs.setdefault(arm["name"], {})[arm["training"]["config"]["learning_rate"]] = arm
    rows = []
    for name, by_rate in sorted(runs.items(), key=lambda item: min(map(loss, item[1].values()))):
        best = min(by_rate, key=lambda rate: loss(by_rate[rate]))
        arm = by_rate[best]
        others = ", ".join(f"{rate:g}: {loss(by_rate[rate]):.4f}" for rate in sorted(by_rate) if rate != best)
        steps = arm["training"]["config"]["steps"]
        rows.append(
            (
                name,
                " ".join(_ranges(adapted_layers(arm))),
                str(steps),
                f"{best:g}",
                f"{loss(arm):.4f}",
                others,
            )
        )
    return table(("arm", "layers", "steps", "best rate", "held-out loss", "loss at other rates"), rows)


def probe_batches(content: dict[str, Any]) -> list[str]:
    """By score and number of batches: the share of its half that two seeds have in common; how ranks correlate."""
    counts = sorted({one["batches"] for one in content["probes"]})
    rows = []
    for method in content["probes"][0]["scores"]:
        by_count = [
            [one["scores"][method]["layers"] for one in content["probes"] if one["batches"] == count]
            for count in counts
        ]
        halves = [[set(highest_layers(layers, 50)) for layers in seeds] for seeds in by_count]
        common = [
            statistics.fmean(len(first & second) / len(first) for first, second in combinations(seeds, 2))
            for seeds in halves
        ]
        ranks = [spearman(first, second) for first, second in combinations(by_count[-1], 2)]
        rows.append(
            (
                method,
                *(f"{share:.2f}" for share in common),
                f"{statistics.fmean(rank for rank in ranks if rank is not None):.2f}",
                " ".join(_ranges(sorted(halves[-1][0]))),
            )
        )
    header = (
        "score", *(f"{count} {'batch' if count == 1 else 'batches'}" for count in counts),
        f"rank correlation, {counts[-1]}", f"half chosen by seed 0, {counts[-1]}",
    )  # fmt: skip
    return table(header, rows)


LAYER = re.compile(r"\.(\d+)\.")


def adapted_layers(arm: dict[str, Any]) -> list[int]:
    return sorted({int(found[1]) for module in arm["plan"]["modules"] if (found := LAYER.search(module))})


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Runs of numbers as first–last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]


def write_tables() -> None:
    """Puts each verdict's table between its marks in the page."""
    text = PAGE.read_text(encoding="utf-8")
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == "aletheia-race":
            lines = one_race(content)
        elif content["format"] == SEARCH:
            lines = search(content)
        elif content["format"] == PROBE:
            lines = probe_batches(content)
        elif path.stem.startswith("selection"):
            lines = selection(content)
        else:
            lines = time_to_target(content)
            if evaluated_on_the_way(content):
                (PAGE.parent / f"race-{path.stem}.svg").write_text(picture(content), encoding="utf-8")
        facts = content.get("machine", {})
        lines += (
            ["", f"*{', '.join(f'{key}: {facts[key]}' for key in MACHINE if key in facts)}*"] if facts else []
        )
        marks = f"<!-- {path.stem} -->", f"<!-- /{path.stem} -->"
        assert all(text.count(mark) == 1 for mark in marks), f"{PAGE} has no place for {path.stem}"
        begin, end = text.index(marks[0]) + len(marks[0]), text.index(marks[1])
        text = text[:begin] + "\n" + "\n".join(lines) + "\n" + text[end:]
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="directories of finished races, to be kept")
    for run in parser.parse_args().runs:
        print(keep(run))
    write_tables()


if __name__ == "__main__":
    main()
