"""Fine-tuning as a plan says on `transformers.Trainer`: glue, measurements and a safe ending."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler

from aletheia_tune import files
from aletheia_tune.checkpoint import Checkpoint, Keeper, identity, records, table
from aletheia_tune.classification import class_of, is_classifier
from aletheia_tune.data import Collator, Example, batches, pad_token_id
from aletheia_tune.environment import is_first_process, peak_memory_mb, require_whole_models, versions
from aletheia_tune.errors import NonFiniteLoss, UserError
from aletheia_tune.evaluation import held_out
from aletheia_tune.full import float32_weights
from aletheia_tune.kernels import KernelsInUse, use_kernels
from aletheia_tune.layers import positions_of
from aletheia_tune.metrics import NO_PACKING, NO_PREFIX_CACHE, EvalRecord, StepRecord, TrainResult
from aletheia_tune.packing import PackingCollator, tokens_in
from aletheia_tune.prefix import PrefixCut, cut_prefix
from aletheia_tune.prefix_cache import PrefixCache, cache_prefix
from aletheia_tune.quantised import kept_layout
from aletheia_tune.rates import parameter_groups
from aletheia_tune.sampled_depth import DepthSampler, sampled_depth
from aletheia_tune.separation import require_separation, why_not_shared
from aletheia_tune.shrink import Shrinking, lowest_kept
from aletheia_tune.start import gradient_start
from aletheia_tune.training_config import FREE_SETTINGS, TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from aletheia_tune.patch import PatchReport
    from aletheia_tune.plan import Plan

START_BATCHES = 4
MAX_GRAD_NORM = 1.0
# Tokens of a forward pass that is run to see how the model goes about it.
SMALL = 16


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_examples: Sequence[Example],
    eval_examples: Sequence[Example] | None,
    plan: Plan,
    config: TrainConfig,
    out_dir: str | os.PathLike[str],
    callbacks: Sequence[TrainerCallback] = (),
    *,
    overwrite: bool = False,
    resume: bool = False,
) -> TrainResult:
    """Train the plan's LoRA adapters, and what it trains in full, on `transformers.Trainer`; save it as PEFT would.

    `out_dir` appears once all is in it: the adapter (`adapter_config.json`, `adapter_model.safetensors`),
    `plan.json` and `metrics.json` (`TrainResult.to_dict`). The model is wrapped in place; `TrainResult.model`
    is the wrapper.

    If the loss or the norm of the gradients stops being finite, the adapter goes back to the last weights
    that gave a finite loss and finite gradients, those are saved with the reason under "stopped", and the
    error is raised. Ctrl-C saves what there is likewise. If no loss was ever finite there is nothing worth
    keeping, and nothing is written.

    With `checkpoint_every`, a training that ends in any other way, killed for example, loses the steps since its last
    checkpoint: the file `out_dir`.checkpoint.safetensors, which lies there until the adapter does. With `resume` the
    same call goes on from it and comes to the adapter and the metrics of a training that nothing stopped, bit for bit
    on CPUs with one number of threads.

    Started by torchrun or `accelerate launch`, every process trains on its own part of each step's examples, as the
    Trainer shares them out (`batch_size` is that of a process), and the first writes.

    Args:
        model: the pretrained model, without adapters; moved to the accelerator if there is one.
        tokenizer: for its padding id.
        train_examples: `input_ids` and `labels` (-100 where not trained on), as `data.load_examples` gives them.
        eval_examples: held-out examples, evaluated before and after training and every `eval_every` steps; or
            None.
        plan: which modules, of which rank.
        config: everything else.
        out_dir: must not exist or be empty, unless `overwrite`.
        callbacks: of the Trainer's kind, called before this function's own.
        overwrite: replace a directory that is there.
        resume: go on from the checkpoint, or begin if there is none. An adapter that was saved when training was
            stopped is replaced.

    Raises:
        UserError: the output directory is taken, a plan that does not fit the model, no examples, one that is longer
            than the model has positions for, packing with a classifier or a model that does not keep packed examples
            apart, gradients reweighted without sampled depth, a plan that cannot shrink as asked; a launch that shards
            the model; a checkpoint that is damaged, of another training, or there without `resume`; the disk is full.
        NonFiniteLoss: as said; its `step` counts from 1, and is 0 for what precedes training.
        KeyboardInterrupt: with one line on what was kept as its message.
    """
    if not train_examples:
        raise UserError("there are no training examples")
    positions = positions_of(model)
    longest = max(len(example["input_ids"]) for example in (*train_examples, *(eval_examples or ())))
    if positions is not None and longest > positions:
        raise UserError(
            f"an example has {longest} tokens and the model positions for {positions}: load the examples with "
            f"positions={positions}"
        )
    require_whole_models()
    if config.packing and is_classifier(model):
        raise UserError(
            "packing is for language models: a classifier reads one text a row, so train without it"
        )
    if config.reweight_depth and config.sampled_depth is None:
        raise UserError("reweight_depth goes with sampled_depth: give both")
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_SETTINGS}
    keeper = Keeper(
        out_dir,
        lambda: identity(
            model, dataclasses.replace(plan, meta={}).to_json(), train_examples, eval_examples, settings
        ),
        every=config.checkpoint_every,
        overwrite=overwrite,
        resume=resume,
    )
    with keeper, _output_directory(out_dir, keeper.replaces) as directory, _threads(config.threads):
        started = time.perf_counter()
        transformers.set_seed(config.seed)
        peft_model = plan.wrap(model, float32=config.adapter_dtype == "float32")
        collator = Collator(pad_token_id(tokenizer), positions)
        run = _Run(peft_model, collator, eval_examples or (), config, keeper)
        shown = config.progress and is_first_process()
        progress = _ShowProgress(run, Console(stderr=True, quiet=not shown))
        if resume:
            progress.console.print(keeper.says(), highlight=False, soft_wrap=True)
        with contextlib.ExitStack() as undo:
            undo.enter_context(kept_layout(model))
            if config.gradient_checkpointing:
                undo.enter_context(_checkpointed(model))
            trainer = undo.enter_context(
                _trainer(run, train_examples, directory, [*callbacks, run, progress])
            )
            kernels: KernelsInUse | None = None
            cut = cut_prefix(peft_model)
            undo.callback(cut.remove)
            cache: PrefixCache | None = None
            keep: Callable[[PrefixCut], PrefixCache] | None = None
            shrinking: Shrinking | None = None
            if config.init == "gradient" and keeper.found is None:
                run.start_from_gradient(train_examples)
            undo.callback(progress.close)
            if config.adapter_dtype == "float32":
                undo.enter_context(float32_weights(peft_model))
            if config.kernels:
                small = _small_inputs(run, train_examples)
                kernels = undo.enter_context(
                    use_kernels(peft_model, example_inputs=small, label_smoothing=config.label_smoothing)
                )
                progress.console.print(str(kernels.patch), highlight=False, soft_wrap=True)
                if kernels.head.active:
                    # The Trainer's own would keep the labels from the model and ask it for all logits.
                    trainer.label_smoother = None
            packing = NO_PACKING
            if config.packing:
                require_separation(peft_model)
                apart = "the prefix cache keeps whole ones"
                if config.prefix_cache is None:
                    apart = why_not_shared(
                        peft_model, max(len(example["input_ids"]) for example in train_examples)
                    )
                trainer.data_collator = PackingCollator(share=not apart)
                packing = f"examples in whole: {apart}" if apart else "a common beginning once"
            if config.prefix_cache is not None:
                # After the operators, whose rounding is part of what it keeps.
                keep = partial(
                    cache_prefix,
                    peft_model,
                    directory=config.prefix_cache,
                    gigabytes=config.prefix_cache_gb,
                )
                cache = undo.enter_context(keep(cut))
            if config.sampled_depth is not None:
                run.depth = undo.enter_context(sampled_depth(peft_model, config.sampled_depth, config.seed))
            if config.shrink_after is not None:
                lowest = lowest_kept(plan, config.shrink_to)
                shrinking = undo.enter_context(
                    Shrinking(peft_model, lowest, config.shrink_after, cut, cache, keep)
                )
                trainer.add_callback(shrinking)
            setup_seconds = time.perf_counter() - started - run.seconds
            stop = run.to_the_end(trainer, out_dir)
        if shrinking is not None:
            cut, cache = shrinking.cut, shrinking.cache
        if not run.worth_keeping:
            assert stop is not None
            raise stop
        result = TrainResult(
            history=tuple(run.history),
            evals=tuple(run.evals),
            trainable_parameters=sum(parameter.numel() for parameter in run.adapters),
            peak_memory_mb=peak_memory_mb(next(peft_model.parameters()).device),
            patch_report=None if kernels is None else _report_dict(kernels.patch),
            head="all rows: kernels are off" if kernels is None else str(kernels.head),
            attention="the model's own: kernels are off" if kernels is None else str(kernels.attention),
            norms="none: kernels are off" if kernels is None else str(kernels.norms),
            prefix_layers=cut.lowest_layer or 0,
            prefix_cache=NO_PREFIX_CACHE if cache is None else str(cache),
            packing=packing,
            stopped=None if stop is None else str(stop),
            # In JSON's types, so that what is read back is equal.
            config=json.loads(json.dumps(dataclasses.asdict(config))),
            versions=versions(),
            setup_seconds=setup_seconds,
            classes=class_of(model),
            model=peft_model,
        )
        # The embeddings are frozen: without the flag PEFT may ask the hub whether they were resized.
        peft_model.save_pretrained(str(directory), save_embedding_layers=False)
        files.write_text(directory / "plan.json", plan.to_json())
        files.write_text(
            directory / "metrics.json", json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
        )
    if stop is not None:
        raise stop
    keeper.discard()
    return result


@contextlib.contextmanager
def _output_directory(out_dir: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """Where to write: of several processes that train one adapter the first writes what all of them have."""
    if is_first_process():
        with files.output_directory(out_dir, overwrite) as directory:
            yield directory
    else:
        with tempfile.TemporaryDirectory() as directory_name:
            yield Path(directory_name)


class _NonFinite(Exception):
    """A loss or gradient norm is not finite; `step` counts from 1."""

    def __init__(self, what: str, value: float, step: int) -> None:
        super().__init__(f"the {what} became {value} at step {step}")
        self.step = step


class _Run(TrainerCallback):
    """The state of one training run: what was measured, and the last good adapter weights."""

    def __init__(
        self,
        model: PeftModel,
        collator: Collator,
        eval_examples: Sequence[Example],
        config: TrainConfig,
        keeper: Keeper,
    ) -> None:
        self.model = model
        self.collator = collator
        self.eval_examples = eval_examples
        self.config = config
        self.keeper = keeper
        self.adapter_names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.history: list[StepRecord] = []
        self.evals: list[EvalRecord] = []
        self.depth: DepthSampler | None = None
        self.seconds = 0.0
        self.step_tokens = 0
        self.forward_seconds = self.backward_seconds = 0.0
        self.worth_keeping = False
        self._before_update: list[Tensor] | None = None
        self._updating = False
        self._step_started = 0.0
        self._step_seconds = 0.0

    def start_from_gradient(self, examples: Sequence[Example]) -> None:
        started = time.perf_counter()
        config = self.config
        chosen = batches(
            examples,
            config.batch_size,
            self.collator.pad_token_id,
            seed=config.seed,
            count=START_BATCHES,
            positions=self.collator.positions,
        )
        gradient_start(self.model, chosen, seed=config.seed)
        self.seconds += time.perf_counter() - started

    def evaluate(self) -> None:
        loss, accuracy = held_out(self.model, self.eval_examples, self.collator, self.config.eval_batch_size)
        if not math.isfinite(loss):
            raise _NonFinite("held-out loss", loss, len(self.history))
        self.worth_keeping = True
        self.evals.append(EvalRecord(len(self.history), self.seconds, loss, accuracy))

    def to_the_end(self, trainer: Trainer, out_dir: str | os.PathLike[str]) -> BaseException | None:
        """Evaluate, train, evaluate; if it ended early, what to raise once the good weights are saved."""
        try:
            if self.keeper.found is not None:
                self._go_on(trainer, self.keeper.found)
            else:
                if self.eval_examples:
                    self.evaluate()
                trainer.train()
            if self.eval_examples and self.evals[-1].step != len(self.history):
                self.evaluate()
        except _NonFinite as error:
            return self._stopped_by(error, out_dir)
        except KeyboardInterrupt:
            return self._interrupted(out_dir)
        return None

    def _go_on(self, trainer: Trainer, found: Checkpoint) -> None:
        """Train from a checkpoint to the end."""
        named = self._named(self.adapters)
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self.adapters), found.weights("adapter", named))
            self._before_update = [parameter.clone() for parameter in self.adapters]
            torch._foreach_copy_(self._before_update, found.weights("good", named))
        self.history = records(StepRecord, found.tensors["metrics history"])
        self.evals = records(EvalRecord, found.tensors["metrics evals"])
        self.seconds = self.history[-1].seconds
        self.worth_keeping = True
        # The Trainer reads the step count from a file of its own, for the place in the data; for the rest it asks
        # `_Trainer`.
        state = TrainerState(global_step=found.step, train_batch_size=trainer.args.train_batch_size)
        state.compute_steps(trainer.args, trainer.args.max_steps)
        with tempfile.TemporaryDirectory() as place:
            state.save_to_json(str(Path(place) / "trainer_state.json"))
            trainer.train(resume_from_checkpoint=place)

    def _named(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.adapter_names, (weight.detach() for weight in weights), strict=True))

    def _checkpoint(self, step: int, optimizer: Any, scheduler: Any) -> None:
        if not all(bool(weight.isfinite().all()) for weight in self.adapters):
            raise _NonFinite("adapter", math.nan, step)
        assert self._before_update is not None
        metrics = {"history": table(StepRecord, self.history), "evals": table(EvalRecord, self.evals)}
        weights, good = self._named(self.adapters), self._named(self._before_update)
        self.keeper.keep(
            Checkpoint.of(
                step, self.keeper.identity, weights, good, optimizer, scheduler, self.generators(), metrics
            )
        )

    def generators(self) -> dict[str, torch.Generator]:
        """Random generators of this run's own."""
        return {} if self.depth is None else {"sampled depth": self.depth.generator}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_started = time.perf_counter()
        self.step_tokens = 0
        self.forward_seconds = self.backward_seconds = 0.0
        if self.depth is not None:
            self.depth.draw()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # These weights gave a finite loss and finite gradients; of those that the update makes nothing is known yet.
        weights = [parameter.detach() for parameter in self.adapters]
        if self._before_update is None:
            self._before_update = [weight.clone() for weight in weights]
        else:
            torch._foreach_copy_(self._before_update, weights)
        self.worth_keeping = True
        self._updating = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._updating = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_seconds = time.perf_counter() - self._step_started
        self.seconds += self._step_seconds

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "grad_norm" not in logs:  # the summary at the end of training
            return
        timed = args.device.type == "cpu"
        self.history.append(
            StepRecord(
                step=state.global_step,
                seconds=self.seconds,
                step_seconds=self._step_seconds,
                loss=float(logs["loss"]),
                learning_rate=float(logs["learning_rate"]),
                grad_norm=float(logs["grad_norm"]),
                tokens=self.step_tokens,
                forward_seconds=self.forward_seconds if timed else None,
                backward_seconds=self.backward_seconds if timed else None,
            )
        )
        # The Trainer's own history would hold the same and more, a dictionary a step.
        state.log_history.clear()
        every = self.config.eval_every
        if every and self.eval_examples and state.global_step % every == 0:
            self.evaluate()
        # Not after the last step, which the Trainer could not go on from and the adapter follows at once.
        if self.keeper.due(state.global_step) and state.global_step < state.max_steps:
            self._checkpoint(state.global_step, kwargs["optimizer"], kwargs["lr_scheduler"])

    def _stopped_by(self, error: _NonFinite, out_dir: str | os.PathLike[str]) -> NonFiniteLoss:
        """Go back to the last good weights, and the error to raise once they are saved."""
        # Good are weights that were seen to give a finite loss and finite gradients, so not the last
        # update's.
        if self.history:
            self._go_back()
        updates = max(len(self.history) - 1, 0)
        if not self.worth_keeping:
            return NonFiniteLoss(
                f"{error}, before any update, and nothing was written: "
                "check the model's weights and the data",
                step=error.step,
            )
        return NonFiniteLoss(
            f"{error}; the adapter after {updates} good updates is in {out_dir}: "
            f"lower the learning rate, or train in float32{self.keeper.kept()}",
            step=error.step,
        )

    def _interrupted(self, out_dir: str | os.PathLike[str]) -> KeyboardInterrupt:
        """Undo an update that was cut short, and the interrupt to raise once the weights are saved."""
        if self._updating:
            self._go_back()
        if not self.history:
            self.worth_keeping = False
            return KeyboardInterrupt(
                f"interrupted before the first step was done; nothing was written{self.keeper.kept()}"
            )
        return KeyboardInterrupt(
            f"interrupted after step {len(self.history)}; the adapter so far is in {out_dir}{self.keeper.kept()}"
        )

    def _go_back(self) -> None:
        assert self._before_update is not None
        torch._foreach_copy_([parameter.data for parameter in self.adapters], self._before_update)


class _Trainer(Trainer):
    """The library's trainer, told to stop at the first loss or gradient norm that is not finite."""

    run: _Run

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        packed = self.run.config.packing
        self.run.step_tokens += tokens_in(inputs) if packed else int(inputs["attention_mask"].sum())
        started, forward = time.perf_counter(), self.run.forward_seconds
        loss = super().training_step(model, inputs, num_items_in_batch)
        forward = self.run.forward_seconds - forward
        self.run.backward_seconds += time.perf_counter() - started - forward
        if not math.isfinite(loss.item()):
            raise _NonFinite("loss", loss.item(), len(self.run.history) + 1)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None: nobody asks for their sum, and the library would count the model's parameters at every step."""
        return 0

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        loss = super().compute_loss(*arguments, **named)
        self.run.forward_seconds += time.perf_counter() - started
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.run.config.group_by_length:
            return super()._get_train_sampler(train_dataset)
        examples: Any = self.train_dataset
        return _LengthGroups(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            [len(example["input_ids"]) for example in examples],
            self.args.seed,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """The weights are in place: `_Run` put them there."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.run.keeper.found is not None:
            self.run.keeper.found.restore_optimizer(self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self.run.keeper.found is not None:
            device = self.run.adapters[0].device
            self.run.keeper.found.restore_random(self.run.generators(), device)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.run.depth is not None and self.run.config.reweight_depth:
            self.run.depth.reweight()
        norm = super()._clip_grad_norm(model)
        if not math.isfinite(float(norm)):
            raise _NonFinite("gradient norm", float(norm), len(self.run.history) + 1)
        return norm


class _LengthGroups(LengthGroupedSampler):
    """The library's sampler in an order of the seed and the epoch alone.

    Its own draws from the global generator, of which every plan leaves another state.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed)
        for _ in range(epoch):
            list(self)


class _ShowProgress(TrainerCallback):
    """Step, loss, tokens/s and time left: a live line on a terminal, about ten plain lines elsewhere."""

    def __init__(self, run: _Run, console: Console) -> None:
        self.run = run
        self.console = console
        self.bar: Progress | None = None
        self.seen = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        history = self.run.history
        if len(history) == self.seen:
            return
        self.seen = len(history)
        last = history[-1]
        rate = sum(record.tokens for record in history) / last.seconds
        text = f"loss {last.loss:.4f}  {rate:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=last.step, description=text)
        elif last.step in (1, state.max_steps) or last.step % max(1, state.max_steps // 10) == 0:
            left = last.seconds / last.step * (state.max_steps - last.step)
            self.console.print(
                f"step {last.step}/{state.max_steps}  {text}  {left:,.0f} s left", highlight=False
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


# Of this process, now. Accelerate keeps one state for all of them, and a Trainer empties it when it is made: the others
# would find nothing there. So the first makes it, and whoever comes while that one trains takes it as it is.
_TRAINING: list[Trainer] = []
_MAKING = threading.Lock()


@contextlib.contextmanager
def _trainer(
    run: _Run, train_examples: Sequence[Example], directory: Path, callbacks: list[TrainerCallback]
) -> Iterator[_Trainer]:
    with _MAKING:
        trainer = _made(run, train_examples, directory, callbacks, take_state=bool(_TRAINING))
        _TRAINING.append(trainer)
    try:
        yield trainer
    finally:
        _TRAINING.remove(trainer)


def _made(
    run: _Run,
    train_examples: Sequence[Example],
    directory: Path,
    callbacks: list[TrainerCallback],
    *,
    take_state: bool,
) -> _Trainer:
    config = run.config
    arguments = TrainingArguments(
        output_dir=str(directory),
        # Said outright: otherwise processes that torchrun starts on CPUs would not find each other, and train alone.
        use_cpu=not torch.accelerator.is_available(),
        max_steps=config.steps if config.steps is not None else -1,
        num_train_epochs=config.epochs if config.epochs is not None else 1.0,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=config.warmup,
        max_grad_norm=MAX_GRAD_NORM,
        label_smoothing_factor=config.label_smoothing,
        seed=config.seed,
        # A seed of its own for the order, so that it does not depend on what was drawn for the adapters' weights.
        data_seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"use_configured_state": take_state},
    )
    # On more cards than one the Trainer would wrap the model in nn.DataParallel: the replicas' forwards would be the
    # operators of the first card's modules. Several cards take a process each.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = _Trainer(
        model=run.model,
        args=arguments,
        train_dataset=train_examples,
        data_collator=run.collator,
        callbacks=callbacks,
    )
    trainer.run = run
    if is_classifier(run.model):
        # Its loss is the mean of one forward pass, whatever number of labels the Trainer counts in a step.
        trainer.model_accepts_loss_kwargs = False
    groups = parameter_groups(
        run.model, config.learning_rate, lora_plus=config.lora_plus, full_rate=config.full_rate
    )
    if len({group["lr"] for group in groups}) > 1:
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        trainer.optimizer = optimizer(groups, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _small_inputs(run: _Run, train_examples: Sequence[Example]) -> dict[str, Tensor]:
    """A row of the first example's first tokens: which modules read one tensor does not depend on how many follow."""
    first = train_examples[0]
    labels = first["labels"] if isinstance(first["labels"], int) else first["labels"][:SMALL]
    batch = run.collator([{"input_ids": first["input_ids"][:SMALL], "labels": labels}])
    batch.pop("labels")
    device = next(run.model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _report_dict(report: PatchReport) -> dict[str, Any]:
    modules = [
        {"module": e.module, "path": e.path, "reason": e.reason, "siblings": list(e.siblings)}
        for e in report.entries
    ]
    return {"summary": str(report), "modules": modules}


@contextlib.contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Gradient checkpointing is on while inside the context, and off again afterwards if it was."""
    was_on = model.is_activation_checkpointing
    model.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if not was_on:
            # transformers itself takes the hook on the embeddings off only where it put the adapters on.
            model.disable_input_require_grads()
            model.activation_checkpointing_disable()


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
