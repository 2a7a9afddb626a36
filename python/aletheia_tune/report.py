"""A race and the plan behind it as one page for a person: no script, nothing fetched, readable on a phone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from aletheia_tune import figures, files

if TYPE_CHECKING:
    from aletheia_tune.plan import Plan
    from aletheia_tune.race import ArmResult, RaceResult
    from aletheia_tune.referee import Verdict
    from aletheia_tune.scores import Scores

Facts = Sequence[tuple[str, str]]

# Batches of unlike length differ by less than this.
DISTURBED = 4


def write_report(
    path: str | os.PathLike[str],
    result: RaceResult,
    scores: Scores,
    *,
    title: str,
    question: str,
    commands: Sequence[str],
    facts: Facts = (),
    overwrite: bool = False,
) -> None:
    """Write the page of a race as one HTML file.

    An arm whose plan was made from `scores` is charged the probe's seconds in the curve over wall-clock and
    in the verdict. The scores' figure marks the layers of the first such plan, and that plan is shown.

    Args:
        path: of the HTML file.
        result: of `race.race`.
        scores: of the probe.
        title: the page's heading.
        question: what was compared, in a sentence.
        commands: to repeat it, one a line.
        facts: more (name, value) pairs for the table of where and how it ran, first in it.
        overwrite: replace a file that is there.

    Raises:
        ValueError: no arm's plan was made from `scores`.
        UserError: the file cannot be written.
    """
    planned = [arm for arm in result.arms if _is_from(arm.plan, scores)]
    if not planned:
        raise ValueError("no arm of the race has a plan made from these scores")
    page = _render(
        title=title,
        question=question,
        verdict=verdict(result, scores),
        limits=_limits(result),
        table=result.cells(),
        curves=_curves(result, scores),
        layers=_layer_figures(planned[0].plan, scores),
        facts=[*facts, *_facts(result, scores)],
        commands=commands,
    )
    files.write_text(path, page, overwrite)


def write_verdict(
    path: str | os.PathLike[str], verdict: Verdict, *, commands: Sequence[str], overwrite: bool = False
) -> None:
    """Write the page of a referee's verdict as one HTML file.

    Args:
        path: of the HTML file.
        verdict: of `referee.referee`.
        commands: to repeat it, one a line.
        overwrite: replace a file that is there.

    Raises:
        UserError: the file cannot be written.
    """
    rates = "; ".join(
        f"{name}: " + ", ".join(f"{loss:.4f} at {rate}" for rate, loss in losses.items())
        for name, losses in verdict.rates.items()
    )
    page = _render(
        title=f"{verdict.task}: time to uniform LoRA's held-out loss",
        question="Who reaches first, and how much sooner, the held-out loss that PEFT's uniform LoRA ends with? Every "
        "arm runs at the learning rate that its own search found best.",
        verdict=_judgement(verdict),
        limits="One model, one task, one machine, and seeds that share the held-out examples on which rates were "
        "chosen. Time runs from before the probe; evaluation is in nobody's time.",
        table=verdict.cells(),
        curves=_verdict_figures(verdict),
        layers=[],
        facts=[*verdict.machine.items(), ("rates tried, held-out loss at the end", rates)],
        commands=commands,
    )
    files.write_text(path, page, overwrite)


def _render(**content: object) -> str:
    environment = Environment(
        loader=PackageLoader("aletheia_tune"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(**content)


def _judgement(verdict: Verdict) -> str:
    """The recommended challenger's figures over all seeds, in two sentences."""
    if verdict.objection:
        return f"No verdict: {verdict.objection}."
    seeds = list(verdict.arms[verdict.recommended].values())
    ratios = sorted(one.ratio_time_to_target for one in seeds if one.ratio_time_to_target is not None)
    missed = len(seeds) - len(ratios)
    if not ratios:
        first = f"{verdict.recommended} did not reach the target with any of {len(seeds)} seeds."
    else:
        spread = f"{ratios[0]:.2f}" if len(ratios) == 1 else f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        times = f"{spread} of the baselines' time, {len(ratios)} of {len(seeds)} seeds"
        first = f"{verdict.recommended} reached the target in {times}" + (
            f"; {missed} did not reach it." if missed else "."
        )
    lower = sum(
        one.loss_equal_time is not None and one.loss_equal_time < one.baseline_loss_equal_time
        for one in seeds
    )
    return f"{first} Trained for the baselines' time it ended with a lower loss in {lower} of {len(seeds)} seeds."


def _verdict_figures(verdict: Verdict) -> list[dict[str, str]]:
    """Where every arm ended, then for each seed the way there of as many arms as can be told apart."""
    results = verdict.results()
    first = next(iter(results.values()))
    names, unit = [arm.name for arm in first.arms], first.loss_unit
    ends = {
        name: [
            arm.training.evals[-1].loss
            for result in results.values()
            for arm in result.arms
            if arm.name == name and arm.training.evals
        ]
        for name in names
    }
    rows = [(name, losses) for name, losses in ends.items() if losses]
    words = "; ".join(f"{name}: {', '.join(f'{loss:.4f}' for loss in losses)}" for name, losses in rows)
    strips = figures.loss_strips(
        rows, x_label=f"held-out loss at the end ({unit})", label=f"Held-out loss at the end. {words}."
    )
    drawn = [_figure(strips, "Every arm after all its steps: a mark for each seed, a bar at the mean.")]
    shown = [name for name in names if name not in verdict.arms or name == verdict.recommended]
    others = [name for name in names if name not in shown]
    shown += others[: max(0, figures.MOST_CURVES - len(shown))]
    for seed, result in results.items():
        curves = [
            figures.Curve(
                arm.name,
                [record.seconds + arm.start_seconds for record in arm.training.evals],
                [record.loss for record in arm.training.evals],
            )
            for arm in result.arms
            if arm.name in shown[: figures.MOST_CURVES]
        ]
        words = "; ".join(f"{curve.name}: {curve.loss[-1]:.4f} after {curve.x[-1]:.0f} s" for curve in curves)
        verdicts = verdict.arms.get(verdict.recommended, {})
        svg = figures.loss_curves(
            curves,
            x_label="seconds, probe and patching included",
            y_label=f"held-out loss ({unit})",
            label=f"Held-out loss by time, seed {seed}. {words}.",
            target=verdicts[seed].target if seed in verdicts else None,
        )
        drawn.append(_figure(svg, f"Seed {seed}: held-out loss by time; evaluation is left out."))
    return drawn


def _is_from(plan: Plan, scores: Scores) -> bool:
    return plan.meta.get("layer_scores") == list(scores.layers)


def _probe_seconds(arm: ArmResult, scores: Scores) -> float:
    return float(scores.meta["seconds"]) if _is_from(arm.plan, scores) else 0.0


def verdict(result: RaceResult, scores: Scores) -> str:
    """What the race found, in sentences: losses, speeds, and times with the probe charged to its plan's arms."""
    objection = result.objection()
    if objection:
        return f"No speed is read off this race: {objection}."
    first, *others = result.arms
    base = first.training
    sentences = [
        f"After {base.history[-1].step} steps, “{first.name}” has a held-out loss of {_loss(first)} "
        f"at {base.step_seconds:.3g} s a step, {base.history[-1].seconds:.0f} s in all."
    ]
    for arm in others:
        training = arm.training
        assert base.step_seconds is not None
        assert training.step_seconds is not None
        speedup = base.step_seconds / training.step_seconds
        probe = _probe_seconds(arm, scores)
        charged = f", its probe of {probe:.0f} s included" if probe else ""
        sentences.append(
            f"“{arm.name}” has {_loss(arm)}, each step {speedup:.2f} times as fast, "
            f"{training.history[-1].seconds + probe:.0f} s in all{charged}."
        )
    disturbed = sum(_disturbed_steps(arm) for arm in result.arms)
    if disturbed:
        sentences.append(
            f"Of all steps, {disturbed} took more than {DISTURBED} times their arm's median, so something else "
            "used the machine: go by the medians, not by the times in all."
        )
    return " ".join(sentences)


def _disturbed_steps(arm: ArmResult) -> int:
    median = arm.training.step_seconds
    assert median is not None
    return sum(record.step_seconds > DISTURBED * median for record in arm.training.history)


def _limits(result: RaceResult) -> str:
    config = result.arms[0].training.config
    steps = len(result.arms[0].training.history)
    examples = config["batch_size"] * config["gradient_accumulation"]
    return (
        f"One seed, {steps} steps of {examples} examples, one learning rate ({config['learning_rate']:g}) "
        "for every arm, one machine. That is enough to see what a step costs here. It is not enough to say "
        "which arm learns better: that takes several seeds, a learning rate tuned for each arm, and other "
        "choices of as many layers as controls."
    )


def _loss(arm: ArmResult) -> str:
    loss = arm.training.eval_loss_after
    return "none measured" if loss is None else f"{loss:.4f}"


def _curves(result: RaceResult, scores: Scores) -> list[dict[str, str]]:
    by_step, by_time = [], []
    for arm in result.arms:
        evals, probe = arm.training.evals, _probe_seconds(arm, scores)
        losses = [record.loss for record in evals]
        by_step.append(figures.Curve(arm.name, [record.step for record in evals], losses))
        by_time.append(figures.Curve(arm.name, [record.seconds + probe for record in evals], losses))
    ends = "; ".join(
        f"{curve.name}: from {curve.loss[0]:.4f} to {curve.loss[-1]:.4f}" for curve in by_step if curve.loss
    )
    times = "; ".join(f"{curve.name}: {curve.x[-1]:.0f} s" for curve in by_time if curve.x)
    y_label = f"held-out loss ({result.loss_unit})"
    return [
        _figure(
            figures.loss_curves(
                by_step, x_label="step", y_label=y_label, label=f"Held-out loss by step. {ends}."
            ),
            "By optimizer step. Arms that learn alike lie on each other.",
        ),
        _figure(
            figures.loss_curves(
                by_time,
                x_label="seconds of training, probe included",
                y_label=y_label,
                label=f"Held-out loss by wall-clock time. {ends}. Time at the end, {times}.",
            ),
            "By wall-clock time of training; evaluation is left out. "
            f"A plan made from scores starts later, by its probe's {float(scores.meta['seconds']):.1f} s.",
        ),
    ]


def _layer_figures(plan: Plan, scores: Scores) -> list[dict[str, str]]:
    named = {name: _place(name, plan.layer_path) for name in plan.modules}
    short = _short({rest for _, rest in named.values()})
    ranks = {(named[name][0], short[named[name][1]]): module.rank for name, module in plan.modules.items()}
    chosen = ", ".join(map(str, plan.layers))
    counts = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(Counter(ranks.values()).items()))
    highest = max(range(len(scores.layers)), key=lambda layer: scores.layers[layer])
    in_full = f" {len(plan.full)} modules, not drawn, are trained in full." if plan.full else ""
    return [
        _figure(
            figures.score_bars(
                scores.layers,
                plan.layers,
                label=f"Score of each of {len(scores.layers)} layers, highest in layer {highest} "
                f"({scores.layers[highest]:.4g}). Chosen layers: {chosen}.",
            ),
            "Score of each layer. ★ and the stronger colour: adapted in the plan.",
        ),
        _figure(
            figures.rank_grid(ranks, plan.num_layers, label=f"LoRA rank by layer and module: {counts}."),
            f"The plan: the LoRA rank of each module ({counts}); an empty cell has no adapter.{in_full}",
        ),
    ]


def _place(name: str, layer_path: str) -> tuple[int, str]:
    """The layer of a module, and its name within the layer."""
    index, _, rest = name.removeprefix(f"{layer_path}.").partition(".")
    return int(index), rest


def _short(names: set[str]) -> dict[str, str]:
    """The last part of each name where that tells them apart, else the last two (GPT-2's c_proj)."""
    last = Counter(name.rpartition(".")[2] for name in names)
    return {
        name: name.rpartition(".")[2]
        if last[name.rpartition(".")[2]] == 1
        else ".".join(name.split(".")[-2:])
        for name in names
    }


def _figure(svg: str, caption: str) -> dict[str, str]:
    return {"svg": Markup(svg), "caption": caption}


def _facts(result: RaceResult, scores: Scores) -> list[tuple[str, str]]:
    training = result.arms[0].training
    config, meta = training.config, result.meta
    probe = scores.meta
    return [
        ("model", f"{meta['model']} in {config['dtype']}, adapters in float32"),
        ("data", f"{meta['train']} to train on, {meta['eval']} held out"),
        (
            "training",
            f"{len(training.history)} steps of {config['batch_size']} examples of at most "
            f"{config['max_length']} tokens, AdamW at {config['learning_rate']:g} ({config['schedule']}), "
            f"seed {config['seed']}",
        ),
        *((arm.name, _how(arm)) for arm in result.arms),
        ("turns", f"each arm in its own process, {meta['slice_steps']} steps at a time in turn"),
        (
            "probe",
            f"{scores.method}, {probe['batches']} batches of {probe['tokens']:,} tokens in all, "
            f"{probe['seconds']:.1f} s",
        ),
        ("allocator", meta["allocator"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in training.versions.items())),
    ]


def _how(arm: ArmResult) -> str:
    linears = "this package's operators" if arm.kernels else "PEFT's own forward"
    prefix = arm.training.prefix_layers
    return (
        f"{linears}; attention in training: {arm.training.attention}; norms on operators: {arm.training.norms}; "
        f"head and loss over {arm.training.head}; layers that run without a graph: {prefix}"
    )
