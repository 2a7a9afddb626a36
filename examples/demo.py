"""The main job: SmolLM2-135M learns to write Python functions, by a plan from its gradients and by uniform LoRA.

Run from the repository's root by `make run`. It probes, plans, and trains three arms for the same steps in
turns: PEFT's uniform LoRA, the same adapters on this package's operators, and the plan on this package's
operators. It ends with a table and writes `runs/demo`: the plan's adapter as PEFT saves it, `plan.json`,
`scores.json`, `metrics.json` (the whole race) and `report.html`. The converted model stays in `runs/demo-cache`
for the next time.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import demo_data
import torch
import transformers
from peft import PeftModel
from rich.console import Console

from aletheia_kernels import tune_allocator
from aletheia_tune import files
from aletheia_tune.data import Collator, batches, load_examples, pad_token_id
from aletheia_tune.environment import machine_facts
from aletheia_tune.errors import UserError
from aletheia_tune.evaluation import held_out_loss
from aletheia_tune.loading import load_model
from aletheia_tune.norms import kernel_norms
from aletheia_tune.patch import apply_kernels
from aletheia_tune.plan import Plan, make_plan, uniform_plan
from aletheia_tune.probe import probe
from aletheia_tune.race import Arm, RaceResult, race
from aletheia_tune.report import verdict, write_report
from aletheia_tune.scores import Scores
from aletheia_tune.training_config import TrainConfig

RUNS = Path("runs")
RANK = 16
SHARE = 50
PROBE_BATCHES = 5
TRAIN_EXAMPLES = 1000
HELD_OUT_EXAMPLES = 48
# 8 windows of 512 tokens.
HAMLET_CHARACTERS = 14_000
CONFIG = TrainConfig(
    steps=36,
    batch_size=4,
    learning_rate=1e-3,
    warmup=4,
    max_length=256,
    eval_every=12,
    eval_batch_size=8,
)
SLICE_STEPS = 4
# Narrower, the table's cells are cut off; a terminal that is narrower wraps its lines.
TABLE_WIDTH = 118

PEFT_ARM = "PEFT, uniform r=16"
KERNEL_ARM = "uniform r=16, our kernels"
PLAN_ARM = "Aletheia plan, our kernels"

PLAN_FILE, SCORES_FILE, METRICS_FILE, REPORT_FILE = "plan.json", "scores.json", "metrics.json", "report.html"
ADAPTER_FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Task:
    """A model, what it learns, what it is measured on, and how long it is trained."""

    model_dir: Path
    train_path: Path
    eval_path: Path
    other_text: str
    config: TrainConfig
    slice_steps: int
    title: str
    question: str


@dataclass(frozen=True)
class Check:
    """How a fresh model with the saved adapter compares with the model that was trained.

    Errors are the RMS of a difference of logits over the RMS of the exact ones, those of stock PEFT in float32.

    Attributes:
        trained_loss: held-out loss of the trained model after its last step.
        loaded_loss: the same of the fresh model, on the operators that it was trained on.
        stock_error: of the fresh model's logits in stock PEFT, in the dtype of the training.
        trained_error: of its logits on the operators that it was trained on.
    """

    trained_loss: float
    loaded_loss: float
    stock_error: float
    trained_error: float

    @property
    def passed(self) -> bool:
        """The weights are those that were trained, and stock PEFT rounds no worse than its own dtype makes it.

        Equal weights on equal operators give equal losses. The two paths round at different places, so each may
        be off by what the dtype costs: neither may be more than twice as far from the exact logits as the other.
        """
        same_weights = abs(self.trained_loss - self.loaded_loss) <= 1e-5 * self.trained_loss
        low, high = sorted((self.stock_error, self.trained_error))
        return same_weights and high <= 2 * low + 1e-5

    def __str__(self) -> str:
        return (
            f"held-out loss {self.loaded_loss:.4f} where training ended at {self.trained_loss:.4f}; logits off the "
            f"exact ones by {self.stock_error:.2%} in stock PEFT, {self.trained_error:.2%} on the operators"
        )


def run(task: Task, out: Path, console: Console) -> RaceResult:
    """Probe, plan, race and report; `out` appears once all is in it.

    Raises:
        UserError: `out` holds something that this function did not write, or what probe or race refuse.
        RuntimeError: the saved adapter is not the model that was trained.
    """
    started = time.perf_counter()
    _refuse_foreign(out)
    with files.output_directory(out, overwrite=True) as directory:
        scores, uniform, planned = _probe_and_plan(task, console)
        arms = [
            Arm(PEFT_ARM, uniform, kernels=False),
            Arm(KERNEL_ARM, uniform, kernels=True),
            Arm(PLAN_ARM, planned, kernels=True),
        ]
        console.print(
            f"race: {len(arms)} arms of {task.config.steps} steps, {task.slice_steps} at a time in turn, "
            f"each at a learning rate of {task.config.learning_rate:g}"
        )
        result = race(
            arms,
            task.model_dir,
            task.train_path,
            task.eval_path,
            task.config,
            directory / "race",
            extra_text=task.other_text,
            extra_text_name="Shakespeare",
            slice_steps=task.slice_steps,
        )
        for name in ADAPTER_FILES:
            shutil.move(directory / "race" / PLAN_ARM / name, directory / name)
        shutil.rmtree(directory / "race")

        trained_loss = result.arms[-1].training.eval_loss_after
        assert trained_loss is not None
        check = check_adapter(task, directory, trained_loss)
        result = dataclasses.replace(result, meta={**result.meta, "check": dataclasses.asdict(check)})
        files.write_text(directory / PLAN_FILE, planned.to_json())
        files.write_text(directory / SCORES_FILE, scores.to_json())
        files.write_text(directory / METRICS_FILE, result.to_json())
        write_report(
            directory / REPORT_FILE,
            result,
            title=task.title,
            question=task.question,
            commands=["make run"],
            facts=[*machine_facts(), ("saved adapter", str(check))],
        )
        if not check.passed:
            raise RuntimeError(f"the saved adapter is not the model that was trained: {check}")
    console.print(result.table())
    console.print(verdict(result))
    console.print(f"The saved adapter, loaded by stock PEFT, is the trained model: {check}.")
    console.print(f"Written: {out} with {REPORT_FILE}, in {time.perf_counter() - started:.0f} s")
    return result


def check_adapter(task: Task, adapter_dir: Path, trained_loss: float) -> Check:
    """Load the saved adapter into fresh models with stock PEFT and hold them against what was trained."""
    model, tokenizer = load_model(task.model_dir, task.config.dtype)
    held_out = load_examples(task.eval_path, tokenizer, max_length=task.config.max_length)
    collator = Collator(pad_token_id(tokenizer))
    batch = collator(held_out[: task.config.batch_size])

    def logits(of: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return of.eval()(**batch).logits[batch["attention_mask"].bool()].double()

    loaded = PeftModel.from_pretrained(model, str(adapter_dir))
    stock = logits(loaded)
    exact = logits(PeftModel.from_pretrained(load_model(task.model_dir, "float32")[0], str(adapter_dir)))

    def error(of: torch.Tensor) -> float:
        return ((of - exact).square().mean() / exact.square().mean()).sqrt().item()

    apply_kernels(loaded)
    with kernel_norms(loaded):
        return Check(
            trained_loss=trained_loss,
            loaded_loss=held_out_loss(loaded, held_out, collator, task.config.eval_batch_size),
            stock_error=error(stock),
            trained_error=error(logits(loaded)),
        )


def _probe_and_plan(task: Task, console: Console) -> tuple[Scores, Plan, Plan]:
    """Scores, the uniform plan, and the plan made from the scores."""
    config = task.config
    model, tokenizer = load_model(task.model_dir, config.dtype)
    examples = load_examples(task.train_path, tokenizer, max_length=config.max_length)
    chosen = batches(
        examples, config.batch_size, pad_token_id(tokenizer), seed=config.seed, count=PROBE_BATCHES
    )
    scores = probe(model, chosen)
    console.print(
        f"probe: {scores.meta['batches']} batches, {scores.meta['tokens']:,} tokens, "
        f"{scores.meta['seconds']:.1f} s for the scores of all {len(scores.layers)} layers"
    )
    planned = make_plan(scores, layers=SHARE, rank=RANK)
    uniform = uniform_plan(model, rank=RANK, alpha=2 * RANK)
    console.print(
        f"plan: {len(planned.layers)} of {planned.num_layers} layers "
        f"({', '.join(map(str, planned.layers))}), {planned.trainable_parameters(model):,} trainable "
        f"parameters; uniform: {uniform.trainable_parameters(model):,}"
    )
    return scores, uniform, planned


def _refuse_foreign(out: Path) -> None:
    """Only this script's own results are replaced."""
    own = {*ADAPTER_FILES, PLAN_FILE, SCORES_FILE, METRICS_FILE, REPORT_FILE}
    strays = sorted(path.name for path in out.iterdir() if path.name not in own) if out.is_dir() else []
    if strays:
        raise UserError(f"{out} holds {strays[0]}, which the demo did not write: move it elsewhere first")


def _smollm2_task(console: Console) -> Task:
    cache = RUNS / "demo-cache"
    cache.mkdir(parents=True, exist_ok=True)
    train_path, eval_path = cache / "train.jsonl", cache / "eval.jsonl"
    model_dir = demo_data.smollm2(cache / "SmolLM2-135M-Instruct")
    split = demo_data.write_stdlib_functions(
        train_path, eval_path, seed=CONFIG.seed, max_characters=1000, overwrite=True
    )
    for path, count in ((train_path, TRAIN_EXAMPLES), (eval_path, HELD_OUT_EXAMPLES)):
        with open(path, encoding="utf-8") as stream:
            head = "".join(itertools.islice(stream, count))
        files.write_text(path, head, overwrite=True)
    console.print(
        f"data: {TRAIN_EXAMPLES} of {split.train:,} functions to train on, {HELD_OUT_EXAMPLES} of "
        f"{split.held_out} held out, from {len(split.held_out_modules)} modules that training never sees"
    )
    return Task(
        model_dir=model_dir,
        train_path=train_path,
        eval_path=eval_path,
        other_text=demo_data.shakespeare_text()[:HAMLET_CHARACTERS],
        config=CONFIG,
        slice_steps=SLICE_STEPS,
        title="SmolLM2-135M on the standard library's functions",
        question=(
            "Does a LoRA plan that adapts half of the layers, those with the largest gradients, train faster "
            "than LoRA on every layer, and what does it lose? A function's body is learned from its "
            "signature and docstring; held-out modules were never trained on; Hamlet's perplexity tells of "
            "forgetting."
        ),
    )


def main() -> int:
    """Exit code 2 and one line when something is the user's to mend."""
    transformers.utils.logging.disable_progress_bar()
    # PEFT asks transformers for something under a name that is going away; by the environment for the arms too.
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning:transformers.modeling_utils"
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.modeling_utils")
    console = Console(highlight=False, soft_wrap=True, width=max(Console().width, TABLE_WIDTH))
    tune_allocator()
    try:
        _refuse_foreign(RUNS / "demo")
        run(_smollm2_task(console), RUNS / "demo", console)
    except UserError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
