"""A race and the plan behind it as one page for a person: no script, nothing fetched, readable on a phone."""

from __future__ import annotations

import os
import shlex
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from aletheia_tune import figures, files, worth
from aletheia_tune.worth import Tariff

if TYPE_CHECKING:
    from aletheia_tune.plan import Plan
    from aletheia_tune.race import ArmResult, RaceResult, RaceTable
    from aletheia_tune.referee import Verdict

Facts = Sequence[tuple[str, str]]
Figure = dict[str, Any]

# Batches of unlike length differ by less than this.
DISTURBED = 4


def write_report(
    path: str | os.PathLike[str],
    result: RaceResult,
    *,
    title: str,
    question: str,
    commands: Sequence[str],
    facts: Facts = (),
    tariff: Tariff | None = None,
    overwrite: bool = False,
) -> None:
    """Write the page of a race as one HTML file.

    An arm whose plan says what its probe took is charged those seconds in the curve over wall-clock and in the
    verdict. The plan that is shown is the last one that was made from scores, or else that of the last arm.

    Args:
        path: of the HTML file.
        result: of `race.race`.
        title: the page's heading.
        question: what was compared, in a sentence.
        commands: to repeat it, one a line; those that made the plan come before them where the plan knows them.
        facts: more (name, value) pairs for the table of where and how it ran, first in it.
        tariff: what an hour of the machine costs.
        overwrite: replace a file that is there.

    Raises:
        UserError: the file cannot be written.
    """
    plans = [arm.plan for arm in result.arms]
    shown = next((plan for plan in reversed(plans) if plan.layer_scores), plans[-1])
    page = _render(
        title=title,
        question=question,
        verdict=verdict(result),
        limits=_limits(result),
        table=result.cells(),
        worth=_worth(
            worth.of_steps(result, tariff or Tariff()),
            f"{worth.STEPS:,} steps",
            "By the median step of each arm on this machine, against the first arm; a probe is paid once and is not in "
            "it. Below zero is a loss.",
        ),
        curves=_curves(result),
        parts=_parts(result),
        layers=_layer_figures(shown),
        facts=[*facts, *_facts(result)],
        commands=[*_made_by(shown), *commands],
    )
    files.write_text(path, page, overwrite)


def write_verdict(
    path: str | os.PathLike[str],
    verdict: Verdict,
    *,
    commands: Sequence[str],
    tariff: Tariff | None = None,
    overwrite: bool = False,
) -> None:
    """Write the page of a referee's verdict as one HTML file.

    Args:
        path: of the HTML file.
        verdict: of `referee.referee`.
        commands: to repeat it, one a line.
        tariff: what an hour of the machine costs.
        overwrite: replace a file that is there.

    Raises:
        UserError: the file cannot be written.
    """
    results = list(verdict.results().values())
    recommended = next(arm for arm in results[0].arms if arm.name == verdict.recommended)
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
        worth=_worth(
            worth.of_verdict(verdict, tariff or Tariff()),
            f"{worth.HOURS} hours of the baselines",
            "By the median seed (lowest and highest seed), for a run whose ratio of times is the one measured here. An "
            "arm that missed the target with a seed is left out.",
        ),
        curves=_verdict_figures(verdict),
        parts=_parts(results[0]),
        layers=_layer_figures(recommended.plan),
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
            f"; {missed} did not reach it." if missed else f".{_confidence(len(ratios))}"
        )
    lower = sum(
        one.loss_equal_time is not None and one.loss_equal_time < one.baseline_loss_equal_time
        for one in seeds
    )
    return f"{first} Trained for the baselines' time it ended with a lower loss in {lower} of {len(seeds)} seeds."


def _confidence(seeds: int) -> str:
    """How sure the range over the seeds is: the median of all lies outside it only if all drawn lie on one side."""
    if seeds == 1:
        return " One seed says nothing of the spread."
    return f" That range holds the median over all seeds with a confidence of {1 - 0.5 ** (seeds - 1):.0%}."


def _verdict_figures(verdict: Verdict) -> list[Figure]:
    """Where every arm ended, then for each seed the way there of as many arms as can be told apart."""
    results = verdict.results()
    first = next(iter(results.values()))
    names, loss_unit = [arm.name for arm in first.arms], first.loss_unit
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
        rows, x_label=f"held-out loss at the end ({loss_unit})", label=f"Held-out loss at the end. {words}."
    )
    drawn = [
        _figure(strips, "Every arm after all its steps: a mark for each seed, a bar at the mean.", alone=True)
    ]
    shown = [name for name in names if name not in verdict.arms or name == verdict.recommended]
    others = [name for name in names if name not in shown]
    shown += others[: max(0, figures.MOST_CURVES - len(shown))]
    verdicts = verdict.arms.get(verdict.recommended, {})
    for seed, result in results.items():
        target = verdicts[seed].target if seed in verdicts else None
        arms = [arm for arm in result.arms if arm.name in shown[: figures.MOST_CURVES]]
        for by, x_label in (("time", "seconds, probe and patching included"), ("steps", "step")):
            curves = [
                figures.Curve(
                    arm.name,
                    [
                        record.step if by == "steps" else record.seconds + arm.start_seconds
                        for record in arm.training.evals
                    ],
                    [record.loss for record in arm.training.evals],
                )
                for arm in arms
            ]
            unit = "steps" if by == "steps" else "s"
            words = "; ".join(
                f"{curve.name}: {curve.loss[-1]:.4f} after {curve.x[-1]:.0f} {unit}" for curve in curves
            )
            svg = figures.loss_curves(
                curves,
                x_label=x_label,
                y_label=f"held-out loss ({loss_unit})",
                label=f"Held-out loss by {by}, seed {seed}. {words}.",
                target=target,
            )
            left_out = "; evaluation is left out" if by == "time" else ""
            drawn.append(_figure(svg, f"Seed {seed}: held-out loss by {by}{left_out}."))
    return drawn


def verdict(result: RaceResult) -> str:
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
        probe = arm.plan.probe_seconds
        charged = f", its probe of {probe:.0f} s included" if probe else ""
        sentences.append(
            f"“{arm.name}” has {_loss(arm)}, each step {speedup:.2f} times as fast{_in_turns(result, arm)}, "
            f"{training.history[-1].seconds + probe:.0f} s in all{charged}."
        )
    disturbed = sum(_disturbed_steps(arm) for arm in result.arms)
    if disturbed:
        sentences.append(
            f"Of all steps, {disturbed} took more than {DISTURBED} times their arm's median, so something else "
            "used the machine: go by the medians, not by the times in all."
        )
    return " ".join(sentences)


def _in_turns(result: RaceResult, arm: ArmResult) -> str:
    """The lowest and the highest speed-up of a single turn, as both arms took them one after the other."""
    size = result.meta["slice_steps"]
    base, own = result.arms[0].training.history, arm.training.history
    if len(base) != len(own):
        return ""
    pairs = list(zip(base, own, strict=True))
    turns = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    if len(turns) < 2:
        return ""
    ratios = [
        statistics.median(record.step_seconds for record, _ in turn)
        / statistics.median(record.step_seconds for _, record in turn)
        for turn in turns
    ]
    return f" ({min(ratios):.2f} to {max(ratios):.2f} in single turns)"


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


def _worth(savings: Sequence[worth.Saving], per: str, note: str) -> RaceTable | None:
    return replace(worth.table(savings, per), notes=(note,)) if savings else None


def _curves(result: RaceResult) -> list[Figure]:
    by_step, by_time = [], []
    for arm in result.arms:
        evals, probe = arm.training.evals, arm.plan.probe_seconds
        losses = [record.loss for record in evals]
        by_step.append(figures.Curve(arm.name, [record.step for record in evals], losses))
        by_time.append(figures.Curve(arm.name, [record.seconds + probe for record in evals], losses))
    ends = "; ".join(
        f"{curve.name}: from {curve.loss[0]:.4f} to {curve.loss[-1]:.4f}" for curve in by_step if curve.loss
    )
    times = "; ".join(f"{curve.name}: {curve.x[-1]:.0f} s" for curve in by_time if curve.x)
    y_label = f"held-out loss ({result.loss_unit})"
    probes = max(arm.plan.probe_seconds for arm in result.arms)
    later = f" A plan made from scores starts later, by its probe's {probes:.1f} s." if probes else ""
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
            f"By wall-clock time of training; evaluation is left out.{later}",
        ),
    ]


def _parts(result: RaceResult) -> list[Figure]:
    """Where the time of a step goes, of the arms that measured it."""
    rows = [(arm.name, parts) for arm in result.arms if (parts := arm.training.seconds_by_part)]
    if not rows:
        return []
    words = "; ".join(
        f"{name}: " + ", ".join(f"{part} {seconds:.3g} s" for part, seconds in parts.items())
        for name, parts in rows
    )
    svg = figures.step_parts(rows, label=f"Where the time of a step goes. {words}.")
    return [
        _figure(
            svg,
            f"Medians. {words}. Forward holds the loss, on the operators its gradient too; update holds the clipping "
            "of the gradients.",
        )
    ]


def _layer_figures(plan: Plan) -> list[Figure]:
    named = plan.places()
    ranks = {named[name]: module.rank for name, module in plan.modules.items()}
    counts = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(Counter(ranks.values()).items()))
    in_full = f" {len(plan.full)} modules, not drawn, are trained in full." if plan.full else ""
    lowest = plan.layers[0]
    cut = (
        f" The backward pass ends at layer {lowest}: what is under it runs without a graph." if lowest else ""
    )
    drawn = [
        _figure(
            figures.rank_grid(ranks, plan.num_layers, label=f"LoRA rank by layer and module: {counts}."),
            f"The plan: the LoRA rank of each module ({counts}); an empty cell has no adapter.{in_full}{cut}",
        )
    ]
    if scores := plan.layer_scores:
        highest = max(range(len(scores)), key=scores.__getitem__)
        bars = figures.score_bars(
            scores,
            plan.layers,
            label=f"Score of each of {len(scores)} layers, highest in layer {highest} "
            f"({scores[highest]:.4g}). Chosen layers: {', '.join(map(str, plan.layers))}.",
        )
        caption = f"Score of each layer ({plan.meta.get('method')}). ★ and the stronger colour: adapted in the plan."
        drawn.insert(0, _figure(bars, caption))
    return drawn


def _figure(svg: str, caption: str, *, alone: bool = False) -> Figure:
    """A drawing for the page; `alone` in its row."""
    return {"svg": Markup(svg), "caption": caption, "alone": alone}


def _made_by(plan: Plan) -> list[str]:
    """The commands that probed and planned, quoted for a shell whatever the plan's file says."""
    probe = plan.meta.get("probe")
    told = [probe.get("command") if isinstance(probe, dict) else None, plan.meta.get("command")]
    return [shlex.join(map(str, one)) for one in told if isinstance(one, list) and one[:1] == ["aletheia"]]


def _facts(result: RaceResult) -> list[tuple[str, str]]:
    training = result.arms[0].training
    config, meta = training.config, result.meta
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
        *(("probe", probe) for probe in dict.fromkeys(_probe(arm.plan) for arm in result.arms) if probe),
        ("allocator", meta["allocator"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in training.versions.items())),
    ]


def _probe(plan: Plan) -> str:
    """What the probe of a plan read and took; empty where the plan does not say."""
    if not plan.probe_seconds:
        return ""
    probe = plan.meta["probe"]
    return (
        f"{plan.meta.get('method')}, {probe.get('batches')} batches of {probe.get('tokens')} tokens in all, "
        f"{plan.probe_seconds:.1f} s"
    )


def _how(arm: ArmResult) -> str:
    linears = "this package's operators" if arm.kernels else "PEFT's own forward"
    training = arm.training
    return (
        f"{linears}; attention in training: {training.attention}; norms on operators: {training.norms}; "
        f"head and loss over {training.head}; packing: {training.packing}; "
        f"layers that run without a graph: {training.prefix_layers}"
    )
