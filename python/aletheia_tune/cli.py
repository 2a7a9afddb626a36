"""The command line: aletheia probe | cost | plan | train | merge | compare | race | doctor."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from aletheia_tune.answers import answer
from aletheia_tune.errors import UserError

# What needs torch is imported inside the commands: --help should not wait for it.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from aletheia_tune.data import Examples, Fields
    from aletheia_tune.plan import Plan

_COMMAND = "aletheia.command"
# Options of a plan that only choices by scores have.
_BY_SCORES = ("scores", "full", "budget", "calibration", "frontier")
# Of a training's metrics, what is left to metrics.json.
_LONG = ("format", "version", "history", "evals", "patch_report", "config", "versions")

# Paragraphs without line breaks: the terminal's width decides.
ABOUT = "\n\n".join(
    (
        "Gradient-guided LoRA fine-tuning: probe, plan, train, and compare with uniform LoRA.",
        "From a model directory and a jsonl file (prompt and completion, messages, or text on each line) to a PEFT "
        "adapter, in two commands:",
        "[bold]aletheia plan --model DIR --rank 4 --alpha 32 --out plan.json\n"
        "aletheia train --model DIR --train train.jsonl --eval eval.jsonl \\\n"
        "  --plan plan.json --packing --out my-adapter[/bold]",
        "Or with layers chosen by their gradients:",
        "[bold]aletheia probe --model DIR --train train.jsonl --out scores.json\n"
        "aletheia plan --scores scores.json --layers 50% --out half.json[/bold]",
        "Does it pay on your task and machine? compare says it for one plan, race over several seeds and learning "
        "rates; both write report.html, a page to read or to send on. doctor tests this installation.",
        "Every command has an example: aletheia COMMAND --help. With --json a command answers in one line of JSON on "
        "stdout; progress and errors go to stderr. A mistake in what was given is one line and exit code 2, and "
        "nothing is half written.",
    )
)


class _Commands(TyperGroup):
    """Turns a `UserError` into one line and exit code 2, Ctrl-C into one line and exit code 130, SIGTERM into 143.

    Keeps the arguments as they were given, for who wants to repeat the command.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_COMMAND] = ["aletheia", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        terminated: list[int] = []

        def terminate(number: int, frame: Any) -> None:
            terminated.append(number)
            raise KeyboardInterrupt

        # What stops a job, a scheduler or a container, ends as Ctrl-C does, with what there is kept.
        before = signal.signal(signal.SIGTERM, terminate)
        try:
            return super().invoke(ctx)
        except UserError as error:
            print(f"aletheia: error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except RuntimeError as error:
            from aletheia_kernels.backends import BackendError

            if not isinstance(error, BackendError):
                raise
            print(f"aletheia: error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as interrupt:
            print(f"aletheia: {str(interrupt) or 'interrupted; nothing was written'}", file=sys.stderr)
            raise typer.Exit(128 + signal.SIGTERM if terminated else 130) from None
        finally:
            signal.signal(signal.SIGTERM, before)


app = typer.Typer(
    cls=_Commands,
    name="aletheia",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True, help=ABOUT)
def about(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None and (text := ctx.get_help()):
        print(text)


class Dtype(StrEnum):
    native = "native"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Method(StrEnum):
    aletheia = "aletheia"
    fisher = "fisher"
    saliency = "saliency"
    energy = "energy"
    hybrid = "hybrid"
    activation = "activation"
    cka = "cka"


class Pooling(StrEnum):
    last = "last"
    last_content = "last-content"
    mean = "mean"


class Control(StrEnum):
    top = "top"
    bottom = "bottom"
    spaced = "spaced"
    random = "random"


class Ranks(StrEnum):
    uniform = "uniform"
    by_type = "by-type"
    by_score = "by-score"


class Init(StrEnum):
    default = "default"
    gradient = "gradient"


class Schedule(StrEnum):
    linear = "linear"
    cosine = "cosine"
    constant = "constant"


Model = Annotated[Path, typer.Option(help="Directory of the model and its tokenizer (safetensors).")]
Train = Annotated[
    Path, typer.Option(help="Training examples, one JSON object a line; of text and label: a classifier.")
]
Eval = Annotated[Path, typer.Option("--eval", help="Held-out examples, one JSON object a line.")]
PlanFile = Annotated[Path, typer.Option("--plan", help="Plan, as `aletheia plan` writes it.")]
OutDir = Annotated[
    Path, typer.Option(help="Directory to write; must not exist or be empty, unless --overwrite.")
]
OutFile = Annotated[Path, typer.Option(help="File to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")]
PromptField = Annotated[str | None, typer.Option(help="Field of the prompt, not trained on.")]
CompletionField = Annotated[str | None, typer.Option(help="Field of the completion, trained on.")]
TextField = Annotated[
    str | None,
    typer.Option(help="Field of a plain text, trained on whole, also where a label stands beside it."),
]
MessagesField = Annotated[
    str | None, typer.Option(help="Field of a chat; what the assistant says is trained on.")
]
MaxLength = Annotated[int, typer.Option(help="Longest example in tokens.")]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="Of the frozen weights; native: bfloat16 where its products are fast, else float32. Adapters are float32."
    ),
]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps; excludes --epochs.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the examples (1 if neither is given).")]
BatchSize = Annotated[int, typer.Option(help="Examples in one forward pass.")]
Accumulation = Annotated[
    int, typer.Option("--gradient-accumulation", help="Forward passes in one optimizer step.")
]
GroupByLength = Annotated[
    bool, typer.Option("--group-by-length", help="Examples of like length share a batch.")
]
Packing = Annotated[
    bool,
    typer.Option("--packing", help="Batches without padding, in one row; what all examples begin with once."),
]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate of AdamW.")]
LoraPlus = Annotated[float, typer.Option(help="LoRA+: learning rate of B over that of A.")]
FullRate = Annotated[
    float, typer.Option(help="Learning rate of what the plan trains in full over that of A.")
]
ScheduleOption = Annotated[Schedule, typer.Option(help="Of the learning rate after the warm-up.")]
Warmup = Annotated[float, typer.Option(help="Warm-up: steps, or below 1 a share of all steps.")]
Smoothing = Annotated[
    float, typer.Option(help="Share of each label spread over the vocabulary, in training.")
]
InitOption = Annotated[
    Init, typer.Option(help="Of the adapters' A: PEFT's, or the leading directions of the first gradients.")
]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Recompute activations: less memory, more time.")
]
PrefixCacheDir = Annotated[
    Path | None,
    typer.Option(
        "--prefix-cache", help="Directory to keep the output of the layers under the lowest adapter in."
    ),
]
PrefixCacheSize = Annotated[float, typer.Option(help="GiB that the prefix cache may take at most.")]
SampledDepth = Annotated[
    str | None,
    typer.Option(
        help="Expected step time, as 80% of a full one's: each backward pass ends at a depth drawn with odds from the "
        "plan's scores and --calibration."
    ),
]
ReweightDepth = Annotated[
    bool,
    typer.Option("--reweight-depth", help="Divide gradients by the odds that sampled depth reaches them."),
]
PricesFile = Annotated[
    Path | None, typer.Option("--calibration", help="Prices of this machine, as `aletheia cost` writes them.")
]
ShrinkAfter = Annotated[
    str | None,
    typer.Option(
        help="Share of the steps, as 50%, after which only the upper layers learn and adapters below stay as they are."
    ),
]
ShrinkTo = Annotated[str | None, typer.Option(help="Share of the layers that learn then (50%).")]
EvalEvery = Annotated[
    int | None, typer.Option(help="Steps between evaluations; before and after only if not given.")
]
CheckpointEvery = Annotated[
    int | None,
    typer.Option(help="Steps between checkpoints, from which --resume goes on; none if not given."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the checkpoint beside --out, or begin if there is none.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
Json = Annotated[bool, typer.Option("--json", help="Answer in one line of JSON on stdout.")]
Price = Annotated[
    float | None, typer.Option("--price-per-hour", help="Of this machine; the page then says what is saved.")
]
Watts = Annotated[
    float | None, typer.Option(help="That this machine draws in training; the page then says what is saved.")
]


@app.command()
def probe(
    ctx: typer.Context,
    model: Model,
    train: Train,
    out: OutFile,
    method: Annotated[
        Method,
        typer.Option(
            help="aletheia: gradient norms, as published; fisher: their squares; saliency: |W * G|; energy: share of "
            "the gradient inside rank 16; hybrid: saliency x share outside it; activation, cka: of the layers' "
            "outputs, without a backward pass."
        ),
    ] = Method.aletheia,
    pooling: Annotated[Pooling, typer.Option(help="Token that stands for an example (cka).")] = Pooling.last,
    faithful: Annotated[
        bool,
        typer.Option("--faithful", help="The published sampling: batch 1, seed 42, loss on every token."),
    ] = False,
    sketch: Annotated[
        bool, typer.Option("--sketch", help="Estimate the norms from random projections: cheaper, not exact.")
    ] = False,
    batches: Annotated[int, typer.Option(help="Batches to probe with.")] = 5,
    batch_size: BatchSize = 4,
    max_length: MaxLength = 1024,
    dtype: DtypeOption = Dtype.native,
    seed: Seed = 0,
    prompt_field: PromptField = None,
    completion_field: CompletionField = None,
    text_field: TextField = None,
    messages_field: MessagesField = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score every layer by what a few batches say: their gradients, or what passes through it.

    Example: [bold]aletheia probe --model ./my-model --train train.jsonl --out scores.json[/bold]
    """
    from aletheia_tune import files
    from aletheia_tune.data import batches as collated_batches
    from aletheia_tune.data import pad_token_id
    from aletheia_tune.layers import positions_of
    from aletheia_tune.probe import faithful_batches
    from aletheia_tune.probe import probe as run_probe

    files.check_output(out, overwrite, directory=False)
    files.check_apart(out, model, train)
    if faithful:
        _goes_without(ctx, "--faithful", "batches", "batch_size")
    if method is not Method.cka:
        _goes_without(ctx, f"--method {method.value}", "pooling")
    fields = _fields(prompt_field, completion_field, text_field, messages_field)
    classes = _classes(model, train, fields)
    if faithful and classes is not None:
        raise UserError("--faithful is the published probe of language models: leave it out for a classifier")
    loaded, tokenizer = _model(model, dtype, classes, seed)
    most = positions_of(loaded)
    examples = _load(train, tokenizer, max_length, most, fields, classes)
    if faithful:
        chosen = faithful_batches(examples)
    else:
        chosen = collated_batches(
            examples, batch_size, pad_token_id(tokenizer), seed=seed, count=batches, positions=most
        )
    scores = run_probe(
        loaded,
        chosen,
        method=method.value,
        exact=not sketch,
        pooling=pooling.value,
        faithful=faithful,
        seed=seed,
    )
    scores.meta["command"] = ctx.meta[_COMMAND]
    files.write_text(out, scores.to_json(), overwrite)
    told = f"scores of {len(scores.layers)} layers: {out}; next: aletheia plan --scores {out} --out plan.json"
    values = {"out": out, "method": scores.method, "layers": scores.layers, "seconds": scores.meta["seconds"]}
    answer(as_json, values, lambda: print(told))


@app.command()
def plan(
    ctx: typer.Context,
    existing: Annotated[
        Path | None, typer.Argument(metavar="[PLAN]", help="A plan that is there, to be shown.")
    ] = None,
    scores: Annotated[Path | None, typer.Option(help="Scores, as `aletheia probe` writes them.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="In place of --scores: every layer of this model, or those of --control; no probe."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Draw the layers, their scores and ranks.")] = False,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Share of the layers to adapt, those of highest score (50%; with --full, or --model and no --control, "
            "100%)."
        ),
    ] = None,
    full: Annotated[
        str | None,
        typer.Option(
            help="Share of their modules to train in full, those of highest score; the others get adapters "
            "(Hybrid-LoRA: 10%, on scores of method hybrid)."
        ),
    ] = None,
    control: Annotated[
        Control | None,
        typer.Option(
            help="Choose as many layers without the scores, to compare with: top is nearest to the loss."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of --control random.")] = 0,
    ranks: Annotated[
        Ranks,
        typer.Option(
            help="uniform: --rank; by-type: --attention-rank and --mlp-rank; by-score: within --budget."
        ),
    ] = Ranks.uniform,
    rank: Annotated[int, typer.Option(help="Rank of every module (uniform).")] = 16,
    attention_rank: Annotated[int, typer.Option(help="Rank of attention modules (by-type).")] = 16,
    mlp_rank: Annotated[int, typer.Option(help="Rank of MLP modules (by-type).")] = 64,
    budget: Annotated[
        str | None,
        typer.Option(
            help="At most: a share of the uniform plan's step time, as 60% (needs --calibration; chooses layers, "
            "modules and ranks), or a number of parameters of adapters (by-score)."
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Prices of this machine, as `aletheia cost` writes them.")
    ] = None,
    frontier: Annotated[
        Path | None, typer.Option(help="SVG file to draw the score kept over step time into.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="LoRA alpha of every module; twice its rank if not given.")
    ] = None,
    rslora: Annotated[
        bool,
        typer.Option("--rslora", help="Scale by alpha / √rank, not alpha / rank; alpha 8 if not given."),
    ] = False,
    targets: Annotated[
        list[str] | None,
        typer.Option(help="Module to adapt, as q_proj; may be repeated. All linears if not given."),
    ] = None,
    dropout: Annotated[float, typer.Option(help="LoRA dropout.")] = 0.0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Choose the layers and the ranks of their adapters, from scores or, for every layer, from the model alone.

    Example: [bold]aletheia plan --scores scores.json --layers 50% --out plan.json[/bold]

    All layers, no probe: [bold]aletheia plan --model ./my-model --rank 4 --alpha 32 --out plan.json[/bold]

    Within a time budget: [bold]aletheia plan --scores scores.json --budget 60% --calibration cost.json
    --out plan.json[/bold]

    A tenth of the modules in full: [bold]aletheia plan --scores hybrid.json --full 10% --out plan.json[/bold]
    A plan that is there, as a picture: [bold]aletheia plan plan.json --show[/bold]
    """
    from aletheia_tune import files
    from aletheia_tune.loading import load_shape
    from aletheia_tune.plan import Plan, make_plan, unscored_plan
    from aletheia_tune.scores import Scores

    if show and as_json:
        raise UserError("--show draws for a person and --json answers a program: give one of them")
    if existing is not None:
        _only_shows(ctx)
        shown = Plan.from_json(_read(existing, "plan"))
        _tell_plan(shown, existing, show=True, as_json=as_json)
        return
    if control is not Control.random:
        _goes_without(ctx, "a choice other than --control random", "seed")
    if ranks is not Ranks.by_type:
        _goes_without(ctx, f"--ranks {ranks.value}", "attention_rank", "mlp_rank")
    if model is not None and out is not None:
        _goes_without(ctx, "--model and no scores", *_BY_SCORES)
        if ranks is not Ranks.uniform:
            _goes_without(ctx, "--model and no scores", "ranks")
        files.check_output(out, overwrite, directory=False)
        files.check_apart(out, model / "config.json")
        share = layers or ("100%" if control is None else "50%")
        shape = load_shape(model)
        made = unscored_plan(
            shape,
            control=control,
            layers=_percent(share, "--layers"),
            seed=seed,
            rank=rank,
            alpha=alpha,
            rslora=rslora,
            targets=targets,
            dropout=dropout,
        )
        made.to_lora_config(shape)  # what `aletheia train` would refuse
        _keep_plan(ctx, made, out, overwrite=overwrite, show=show, as_json=as_json)
        return
    if scores is None or out is None:
        raise UserError(
            "give --scores, or --model for a plan without a probe, and --out; or the file of a plan to show it"
        )
    files.check_output(out, overwrite, directory=False)
    files.check_apart(out, scores, calibration, frontier)
    timed = budget is not None and budget.strip().endswith("%")
    if timed and calibration is None:
        raise UserError(
            f"--budget {budget} is a share of the step time: give --calibration, from `aletheia cost`"
        )
    if not timed and (calibration is not None or frontier is not None):
        raise UserError("--calibration and --frontier go with a time budget: give --budget like 60%")
    chosen_elsewhere = (layers, full, control, targets, alpha)
    if timed and (ranks is not Ranks.uniform or rslora or any(one is not None for one in chosen_elsewhere)):
        raise UserError(
            "--budget in percent chooses layers, modules and ranks: drop --layers, --full, --control, --ranks, "
            "--targets, --alpha and --rslora"
        )
    if frontier is not None:
        files.check_output(frontier, overwrite, directory=False)
        files.check_apart(frontier, scores, calibration)
    read = Scores.from_json(_read(scores, "scores"))
    if budget is not None and calibration is not None:
        from aletheia_tune import budget as budgets
        from aletheia_tune import figures
        from aletheia_tune.cost import Calibration

        prices = Calibration.from_json(_read(calibration, "calibration"))
        made = budgets.budget_plan(
            read, prices, _percent(budget, "--budget") / 100, rank=rank, dropout=dropout
        )
        if frontier is not None:
            points = budgets.frontier(read, prices, rank=rank)
            svg = figures.frontier(
                [(point.cost, point.score) for point in points],
                chosen=(made.meta["predicted_time"], made.meta["score_kept"]),
                label="Score kept over predicted step time",
            )
            files.write_text(frontier, figures.standalone(svg), overwrite)
        if not show and not as_json:
            print(made.explain())
    else:
        made = make_plan(
            read,
            layers=_percent(layers or ("50%" if full is None else "100%"), "--layers"),
            full=0 if full is None else _percent(full, "--full"),
            control=control,
            seed=seed,
            ranks=ranks.value,
            rank=rank,
            attention_rank=attention_rank,
            mlp_rank=mlp_rank,
            budget=None if budget is None else _whole(budget),
            alpha=alpha,
            rslora=rslora,
            targets=targets,
            dropout=dropout,
        )
    _keep_plan(ctx, made, out, overwrite=overwrite, show=show, as_json=as_json)


@app.command()
def cost(
    model: Model,
    out: OutFile,
    batch: Annotated[int, typer.Option(help="Sequences in a batch.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    labelled: Annotated[float, typer.Option(help="Share of the tokens that is trained on.")] = 0.5,
    dtype: DtypeOption = Dtype.native,
    threads: Threads = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Time a few training steps here, so that `aletheia plan --budget 60%` knows what a plan costs.

    Example: [bold]aletheia cost --model ./my-model --out cost.json[/bold]
    """
    import torch

    from aletheia_tune import files
    from aletheia_tune.cost import Batch, calibrate

    files.check_output(out, overwrite, directory=False)
    files.check_apart(out, model)
    shape = Batch(batch, length, labelled)
    if threads is not None:
        if threads < 1:
            raise UserError(f"threads is {threads}: it must be more than 0")
        torch.set_num_threads(threads)
    loaded, _ = _model(model, dtype)
    limit = getattr(loaded.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(f"length {length} is above the model's {limit} positions: give a shorter one")
    calibration = calibrate(loaded, shape)
    files.write_text(out, calibration.to_json(), overwrite)
    uniform = calibration.meta["plans"]["uniform, rank 16"]["measured_s"]
    told = (
        f"uniform rank 16 takes {uniform:.3g} s a step; calibrated in {calibration.meta['seconds']:.0f} s: {out}; "
        f"next: aletheia plan --scores scores.json --budget 60% --calibration {out} --out plan.json"
    )
    values = {"out": out, "uniform_step_seconds": uniform, "seconds": calibration.meta["seconds"]}
    answer(as_json, values, lambda: print(told))


@app.command()
def train(
    ctx: typer.Context,
    model: Model,
    train: Train,
    eval_file: Eval,
    plan_file: PlanFile,
    out: OutDir,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = 4,
    gradient_accumulation: Accumulation = 1,
    group_by_length: GroupByLength = False,
    packing: Packing = False,
    learning_rate: LearningRate = 2e-4,
    lora_plus: LoraPlus = 1.0,
    full_rate: FullRate = 0.1,
    schedule: ScheduleOption = Schedule.linear,
    warmup: Warmup = 0.03,
    label_smoothing: Smoothing = 0.0,
    init: InitOption = Init.default,
    max_length: MaxLength = 1024,
    dtype: DtypeOption = Dtype.native,
    seed: Seed = 0,
    kernels: Annotated[
        bool, typer.Option("--kernels/--no-kernels", help="This package's operators, or PEFT's own forward.")
    ] = True,
    gradient_checkpointing: Checkpointing = False,
    prefix_cache: PrefixCacheDir = None,
    prefix_cache_gb: PrefixCacheSize = 8.0,
    sampled_depth: SampledDepth = None,
    calibration: PricesFile = None,
    reweight_depth: ReweightDepth = False,
    shrink_after: ShrinkAfter = None,
    shrink_to: ShrinkTo = None,
    eval_every: EvalEvery = None,
    eval_batch_size: BatchSize = 4,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    threads: Threads = None,
    prompt_field: PromptField = None,
    completion_field: CompletionField = None,
    text_field: TextField = None,
    messages_field: MessagesField = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train the adapters of a plan; the output is a PEFT adapter with plan.json and metrics.json beside it.

    Example: [bold]aletheia train --model ./my-model --train train.jsonl --eval eval.jsonl --plan plan.json
    --out my-adapter --steps 200[/bold]

    To survive a kill: [bold]aletheia train ... --checkpoint-every 50 --resume[/bold], as often as it takes.
    """
    from aletheia_tune import files
    from aletheia_tune.checkpoint import check_output
    from aletheia_tune.layers import positions_of
    from aletheia_tune.plan import Plan
    from aletheia_tune.train import fine_tune
    from aletheia_tune.training_config import TrainConfig

    check_output(out, overwrite, resume)
    files.check_apart(out, model, train, eval_file, calibration, prefix_cache)
    chosen = Plan.from_json(_read(plan_file, "plan"))
    if shrink_to is not None and shrink_after is None:
        raise UserError("--shrink-to goes with --shrink-after: give --shrink-after like 50%")
    config = TrainConfig(
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        group_by_length=group_by_length,
        packing=packing,
        learning_rate=learning_rate,
        lora_plus=lora_plus,
        full_rate=full_rate,
        schedule=schedule.value,
        warmup=warmup,
        label_smoothing=label_smoothing,
        init=init.value,
        seed=seed,
        dtype=dtype.value,
        max_length=max_length,
        kernels=kernels,
        gradient_checkpointing=gradient_checkpointing,
        prefix_cache=None if prefix_cache is None else str(prefix_cache),
        prefix_cache_gb=prefix_cache_gb,
        sampled_depth=_depth_odds(chosen, sampled_depth, calibration),
        reweight_depth=reweight_depth,
        shrink_after=None if shrink_after is None else _percent(shrink_after, "--shrink-after"),
        shrink_to=_percent(shrink_to or "50%", "--shrink-to"),
        eval_every=eval_every,
        eval_batch_size=eval_batch_size,
        checkpoint_every=checkpoint_every,
        threads=threads,
    )
    if prefix_cache is None:
        _goes_without(ctx, "no --prefix-cache", "prefix_cache_gb")
    if not chosen.full:
        _goes_without(ctx, "a plan that trains nothing in full", "full_rate")
    fields = _fields(prompt_field, completion_field, text_field, messages_field)
    classes = _classes(model, train, fields)
    loaded, tokenizer = _model(model, dtype, classes, seed)
    most = positions_of(loaded)
    examples = _load(train, tokenizer, max_length, most, fields, classes)
    held_out = _load(eval_file, tokenizer, max_length, most, fields, classes)
    result = fine_tune(
        loaded, tokenizer, examples, held_out, chosen, config, out, overwrite=overwrite, resume=resume
    )
    told = (
        f"held-out loss {result.eval_loss_before:.4f} -> {result.eval_loss_after:.4f}, "
        + (
            f"accuracy {result.eval_accuracy_before:.3f} -> {result.eval_accuracy_after:.3f}, "
            if classes is not None
            else ""
        )
        + f"{result.step_seconds:.3g} s a step, {result.tokens_per_second:,.0f} tokens/s, "
        f"{result.trainable_parameters:,} trainable parameters: {out}"
    )
    if prefix_cache is not None:
        told += f"\nprefix cache: {result.prefix_cache}"
    measured = {key: value for key, value in result.to_dict().items() if key not in _LONG}
    answer(as_json, {"out": out, **measured}, lambda: print(told))


@app.command()
def merge(
    model: Model,
    adapter: Annotated[Path, typer.Option(help="Directory of the adapter, as `aletheia train` writes it.")],
    out: OutDir,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write one plain transformers model with an adapter, and what was trained in full, merged into it.

    Example: [bold]aletheia merge --model ./my-model --adapter ./my-adapter --out my-merged-model[/bold]
    """
    from aletheia_tune import files
    from aletheia_tune.merge import merge_adapter

    files.check_output(out, overwrite)
    files.check_apart(out, model, adapter)
    count = merge_adapter(model, adapter, out, overwrite=overwrite)
    answer(as_json, {"out": out, "modules": count}, lambda: print(f"{count} modules merged: {out}"))


@app.command()
def compare(
    ctx: typer.Context,
    model: Model,
    train: Train,
    eval_file: Eval,
    plan_file: PlanFile,
    out: OutDir,
    rank: Annotated[int, typer.Option(help="Rank of the uniform arm.")] = 16,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = 4,
    learning_rate: LearningRate = 2e-4,
    max_length: MaxLength = 1024,
    dtype: DtypeOption = Dtype.native,
    seed: Seed = 0,
    eval_every: EvalEvery = None,
    threads: Threads = None,
    slice_steps: Annotated[int, typer.Option("--slice", help="Steps in a turn.")] = 5,
    other_text: Annotated[
        Path | None, typer.Option(help="Text file of another kind, whose perplexity tells of forgetting.")
    ] = None,
    prompt_field: PromptField = None,
    completion_field: CompletionField = None,
    text_field: TextField = None,
    messages_field: MessagesField = None,
    price_per_hour: Price = None,
    watts: Watts = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a plan on this package's operators beside uniform LoRA in plain PEFT, for the same steps, in turns.

    The output directory gets both adapters, race.json, and report.html: one page to read or to send on.

    Example: [bold]aletheia compare --model ./my-model --train train.jsonl --eval eval.jsonl --plan plan.json
    --out my-comparison --steps 100[/bold]
    """
    from rich.console import Console

    from aletheia_tune import files, worth
    from aletheia_tune.environment import machine_facts
    from aletheia_tune.plan import Plan, uniform_plan
    from aletheia_tune.race import Arm, race
    from aletheia_tune.report import write_report
    from aletheia_tune.training_config import TrainConfig

    files.check_output(out, overwrite)
    files.check_apart(out, model, train, eval_file, plan_file, other_text)
    tariff = worth.Tariff(price_per_hour, watts)
    config = TrainConfig(
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        dtype=dtype.value,
        max_length=max_length,
        eval_every=eval_every,
        threads=threads,
    )
    chosen = Plan.from_json(_read(plan_file, "plan"))
    text = None if other_text is None else _read(other_text, "text")
    fields = _fields(prompt_field, completion_field, text_field, messages_field)
    uniform = uniform_plan(_model(model, dtype, _classes(model, train, fields))[0], rank=rank, alpha=2 * rank)
    result = race(
        [Arm("uniform-peft", uniform, kernels=False), Arm("plan-kernels", chosen, kernels=True)],
        model,
        train,
        eval_file,
        config,
        out,
        fields=fields,
        extra_text=text,
        slice_steps=slice_steps,
        overwrite=overwrite,
    )
    page = out / "report.html"
    write_report(
        page,
        result,
        title=f"{model.resolve().name}: a plan beside uniform LoRA of rank {rank}",
        question=f"Does LoRA by the plan {plan_file}, on this package's operators, train faster than PEFT's own LoRA "
        f"of rank {rank} on every layer, and what does it lose?",
        commands=[shlex.join(ctx.meta[_COMMAND])],
        facts=machine_facts(),
        tariff=tariff,
        overwrite=True,
    )

    def say() -> None:
        Console().print(result.table())
        print(f"adapters, metrics and race.json are in {out}; the page is {page}")

    values = {
        "out": out,
        "page": page,
        "objection": result.objection(),
        "arms": {
            arm.name: {key: value for key, value in arm.training.to_dict().items() if key not in _LONG}
            for arm in result.arms
        },
        "savings_in_1000_steps": [vars(saving) for saving in worth.of_steps(result, tariff)],
    }
    answer(as_json, values, say)


@app.command()
def race(
    ctx: typer.Context,
    task_file: Annotated[Path, typer.Argument(metavar="TASK.toml", help="What is raced; see the docs.")],
    out: Annotated[
        Path, typer.Option(help="Directory to write, or one with runs of this task, which are not run again.")
    ],
    price_per_hour: Price = None,
    watts: Watts = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew in a directory that holds something else.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure who reaches uniform LoRA's held-out loss first, each arm at its own best learning rate.

    Runs that are done stay in the output directory: the same command goes on where it was stopped.

    Example: [bold]aletheia race benchmarks/studies/tasks/code.toml --out runs/race-code[/bold]
    """
    from rich.console import Console

    from aletheia_tune import worth
    from aletheia_tune.referee import VERDICT, read_task, referee
    from aletheia_tune.report import write_verdict

    tariff = worth.Tariff(price_per_hour, watts)
    verdict = referee(read_task(task_file), out, overwrite=overwrite)
    page = out / "report.html"
    command = shlex.join(ctx.meta[_COMMAND])
    write_verdict(page, verdict, commands=[command], tariff=tariff, overwrite=True)

    def say() -> None:
        Console().print(verdict.show())
        print(f"every raw point is in {out / VERDICT}; the page is {page}")

    values = {
        "out": out,
        "page": page,
        "objection": verdict.objection,
        "recommended": verdict.recommended,
        "chosen": verdict.chosen,
        "arms": {
            name: {seed: vars(one) for seed, one in seeds.items()} for name, seeds in verdict.arms.items()
        },
        "savings_in_100_hours": [vars(saving) for saving in worth.of_verdict(verdict, tariff)],
    }
    answer(as_json, values, say)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, processor features and the backend of each operator, and test each operator here.

    Exit code 1 if an operator is wrong on this machine.

    Example: [bold]aletheia doctor[/bold]
    """
    from rich.console import Console

    from aletheia_tune.doctor import examine

    found = examine()
    values = {"healthy": found.healthy, **dataclasses.asdict(found)}
    answer(as_json, values, lambda: found.show(Console()))
    if not found.healthy:
        raise typer.Exit(1)


def _only_shows(ctx: typer.Context) -> None:
    """A plan that is there stays as it is, so options that would make another are a mistake.

    Raises:
        UserError: one was given.
    """
    for name in ctx.params:
        if _is_given(ctx, name) and name not in ("existing", "show", "as_json"):
            raise UserError(
                f"a plan that is there is only shown: drop {_option(name)}, or give --scores or --model and no plan"
            )


def _goes_without(ctx: typer.Context, what: str, *names: str) -> None:
    """Refuses options that would be passed over in silence.

    Raises:
        UserError: one was given.
    """
    for name in names:
        if _is_given(ctx, name):
            raise UserError(f"{_option(name)} does nothing with {what}: drop it")


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _keep_plan(
    ctx: typer.Context, plan: Plan, out: Path, *, overwrite: bool, show: bool, as_json: bool
) -> None:
    from aletheia_tune import files

    plan.meta["command"] = ctx.meta[_COMMAND]
    files.write_text(out, plan.to_json(), overwrite)
    _tell_plan(plan, out, show=show, as_json=as_json)


def _tell_plan(plan: Plan, place: Path, *, show: bool, as_json: bool) -> None:
    def say() -> None:
        if show:
            from rich.console import Console

            from aletheia_tune.picture import draw

            draw(plan, Console())
            print(f"plan: {place}")
        else:
            if plan.full:
                print(plan.explain())
            chosen = ", ".join(str(layer) for layer in plan.layers)
            of = f"{len(plan.layers)} of {plan.num_layers} layers ({chosen})"
            in_full = f", {len(plan.full)} in full" if plan.full else ""
            print(f"{of}, {len(plan.modules)} modules{in_full}: {place}")

    values: dict[str, Any] = {
        "out": place,
        "layers": plan.layers,
        "num_layers": plan.num_layers,
        "ranks": {name: module.rank for name, module in plan.modules.items()},
        "full": plan.full,
        **{key: plan.meta[key] for key in ("predicted_time", "score_kept") if key in plan.meta},
    }
    answer(as_json, values, say)


def _fields(
    prompt: str | None, completion: str | None, text: str | None, messages: str | None
) -> Fields | None:
    from aletheia_tune.data import Fields

    if prompt is completion is text is messages is None:
        return None
    return Fields(prompt=prompt, completion=completion, text=text, messages=messages)


def _classes(model: Path, train: Path, fields: Fields | None) -> tuple[str, ...] | None:
    from aletheia_tune.classification import numbered_classes

    return numbered_classes(model, train, fields)


def _model(
    directory: Path, dtype: Dtype, classes: tuple[str, ...] | None = None, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, in a process that keeps the memory of one step for the next."""
    from aletheia_kernels import tune_allocator
    from aletheia_tune.loading import load_model

    tune_allocator()
    return load_model(directory, dtype.value, classes, seed)


def _load(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    positions: int | None,
    fields: Fields | None,
    classes: tuple[str, ...] | None,
) -> Examples:
    from aletheia_tune.data import load_examples

    examples = load_examples(
        path, tokenizer, max_length=max_length, positions=positions, fields=fields, classes=classes
    )
    if examples.truncated or examples.dropped:
        print(
            f"{path}: {examples.truncated} records cut to {examples.most} tokens, "
            f"{examples.dropped} left out for having no tokens to learn; {len(examples)} remain",
            file=sys.stderr,
        )
    return examples


def _depth_odds(plan: Plan, share: str | None, calibration: Path | None) -> dict[int, float] | None:
    """The odds of sampled depth, as which they are shown."""
    if share is None and calibration is None:
        return None
    if share is None or calibration is None:
        raise UserError(
            "--sampled-depth and --calibration, from `aletheia cost`, go together: give both, or neither"
        )
    from aletheia_tune.cost import Calibration
    from aletheia_tune.depth_odds import depth_odds

    prices = Calibration.from_json(_read(calibration, "calibration"))
    found = depth_odds(plan, prices, _percent(share, "--sampled-depth") / 100)
    print(found, file=sys.stderr)
    return found.odds


def _percent(text: str, option: str) -> float:
    try:
        return float(text.strip().removesuffix("%"))
    except ValueError:
        raise UserError(f"{option} {text} is not a share: give one like 50%") from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"--budget {text} is neither a share of the step time, as 60%, nor a number of parameters"
        ) from None


def _read(path: Path, what: str) -> str:
    from aletheia_tune import files

    return files.read_text(path, what)


def main() -> None:
    """Entry point of the `aletheia` command."""
    app()
