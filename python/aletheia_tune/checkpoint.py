"""A training's state in a file, from which it goes on after a kill as if nothing had happened.

One safetensors file beside the output directory, replaced whole at each writing (`files.write_bytes`): a process that
is killed anywhere leaves either the old checkpoint or the new one. In it are the adapters' weights, the optimizer's
moments and the random generators' states as tensors; everything else is the tensor `state`, JSON in UTF-8. A checksum
over all tensors stands in the header. Nothing is pickled.

The order of the examples is a function of the seed and the epoch, so a step count is the position in the data.

This is one process's, and `fine_tune` goes on from it to the bit. `whole_checkpoint` keeps for a loop of one's own what
any layout of the model can read, and no more: the adapter and the optimizer's tensors, whole and by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from aletheia_tune import files
from aletheia_tune.environment import versions
from aletheia_tune.errors import UserError
from aletheia_tune.prefix_store import DIGEST_BYTES, bytes_of

if TYPE_CHECKING:
    from aletheia_tune.data import Example

FORMAT, VERSION = "aletheia-checkpoint", "1"
# Of each weight, for the fingerprint of a model: two fine-tunings of one model differ in nearly every value.
SAMPLED = 256

Generators = Mapping[str, torch.Generator]


def beside(out_dir: str | os.PathLike[str]) -> Path:
    """Where the checkpoint of a training lies that writes to `out_dir`."""
    out = Path(os.path.realpath(out_dir))
    if not out.name:
        raise UserError(f"output directory {out_dir} has no name: choose another")
    return out.with_name(f"{out.name}.checkpoint.safetensors")


def check_output(out_dir: str | os.PathLike[str], overwrite: bool, resume: bool) -> bool:
    """Refuses an output directory that this training may not write to.

    Args:
        out_dir: as for `files.check_output`.
        overwrite: begin anew, whatever is there.
        resume: go on from the checkpoint.

    Returns:
        Whether a directory that is there may be replaced: with `overwrite`, and with `resume` where it holds the
        adapter of a training that was stopped on the way.

    Raises:
        UserError: the directory is taken or cannot be used, or a checkpoint lies beside it that neither flag speaks of.
    """
    place = beside(out_dir)
    try:
        left = place.exists()
    except OSError as error:
        raise UserError(f"cannot use {out_dir} as output: {error.strerror}") from None
    if left and not (overwrite or resume):
        raise UserError(
            f"{place} is the checkpoint of a training to {out_dir} that was stopped: pass --resume to go on from it "
            f"or --overwrite to begin anew"
        )
    replaces = overwrite or (resume and _was_stopped(Path(out_dir)))
    files.check_output(out_dir, replaces)
    return replaces


def _was_stopped(out_dir: Path) -> bool:
    try:
        metrics = json.loads((out_dir / "metrics.json").read_text(encoding="utf-8"))
        return metrics["format"] == "aletheia-metrics" and metrics["stopped"] is not None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


class Keeper:
    """A training's checkpoints: which it found, when the next is due, and what is said of them when it is stopped.

    As a context it adds to an interrupt that says nothing yet what it leaves behind.

    Attributes:
        found: the checkpoint to go on from; None to begin.
        identity: of the training; empty where no checkpoint is read or written.
        replaces: whether an output directory that is there may be replaced.

    Args:
        out_dir, overwrite, resume: as `check_output` takes them.
        what: makes the training's identity.
        every: steps between checkpoints; None for none.

    Raises:
        UserError: as `check_output`, `Checkpoint.read` and `Checkpoint.require` say; several processes.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        what: Callable[[], dict[str, Any]],
        *,
        every: int | None,
        overwrite: bool,
        resume: bool,
    ) -> None:
        self._place = beside(out_dir)
        self._every = every
        self._last: int | None = None
        self.found: Checkpoint | None = None
        self.identity: dict[str, Any] = {}
        if (every or resume) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("checkpoints are of one process: leave them out where several train one adapter")
        self.replaces = check_output(out_dir, overwrite, resume)
        if every or resume:
            self.identity = what()
        if resume and self._place.exists():
            self.found = Checkpoint.read(self._place)
            self.found.require(self.identity, self._place)
            self._last = self.found.step

    def says(self) -> str:
        """Where a training that was told to resume begins."""
        if self.found is None:
            return f"no checkpoint at {self._place}: training begins at step 1"
        return f"training goes on after step {self.found.step}, from {self._place}"

    def due(self, step: int) -> bool:
        return self._every is not None and step % self._every == 0

    def keep(self, checkpoint: Checkpoint) -> None:
        checkpoint.write(self._place)
        self._last = checkpoint.step

    def discard(self) -> None:
        """The adapter is in its place: nothing is to be gone on from."""
        self._place.unlink(missing_ok=True)
        files.sweep(self._place)

    def kept(self) -> str:
        """What to add to a line that says that training was stopped; empty without a checkpoint."""
        if self._last is None:
            return ""
        return f"; the same command with --resume goes on after step {self._last}, from {self._place}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt) and not str(error) and self.kept():
            raise KeyboardInterrupt(f"interrupted; no adapter was written{self.kept()}") from None


@dataclass(frozen=True)
class Checkpoint:
    """All that a training needs to go on.

    Attributes:
        step: optimizer steps that are done.
        identity: of what, in words and digests; see `identity`.
        tensors: by name: "adapter NAME", "good NAME" (the adapters that last gave a finite loss and gradients),
            "optimizer INDEX KEY", "random NAME", "metrics NAME" (of the caller).
        state: in JSON's types: "groups" and "scheduler" of the optimizer, "python" and "numpy" (their generators).
    """

    step: int
    identity: dict[str, Any]
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    @staticmethod
    def of(
        step: int,
        identity: dict[str, Any],
        adapters: Mapping[str, Tensor],
        good: Mapping[str, Tensor],
        optimizer: Any,
        scheduler: Any,
        generators: Generators,
        metrics: Mapping[str, Tensor],
    ) -> Checkpoint:
        """The state of a training between two steps.

        Args:
            step: optimizer steps that are done.
            identity: as `identity` makes it.
            adapters: the trained weights by name. good: as in the attributes, by the same names.
            optimizer: whose state is tensors alone, as AdamW's.
            scheduler: of its learning rate.
            generators: besides the global ones of Python, NumPy and torch.
            metrics: what was measured so far, as `table` makes it.
        """
        tensors = {
            **{f"adapter {name}": weight for name, weight in adapters.items()},
            **{f"good {name}": weight for name, weight in good.items()},
            **{f"metrics {name}": table for name, table in metrics.items()},
        }
        content = optimizer.state_dict()
        for index, values in content["state"].items():
            tensors.update({f"optimizer {index} {key}": value for key, value in values.items()})
        tensors["random torch"] = torch.random.get_rng_state()
        for device in _devices(adapters.values()):
            tensors[f"random {device}"] = torch.get_device_module(device).get_rng_state(device)
        tensors.update({f"random {name}": one.get_state() for name, one in generators.items()})
        # The global one, legacy or not, is what other people's callbacks and collators draw from.
        legacy: Any = np.random.get_state()  # noqa: NPY002
        name, keys, *rest = legacy
        state = {
            "groups": content["param_groups"],
            "scheduler": scheduler.state_dict(),
            "python": random.getstate(),
            "numpy": [name, keys.tolist(), *rest],
        }
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        return Checkpoint(step, identity, tensors, json.loads(json.dumps(state)))

    def write(self, path: Path) -> None:
        """Put it in place of an earlier one.

        Raises:
            UserError: the disk is full, or the file cannot be written; an earlier one is left as it was.
        """
        state = {"step": self.step, "identity": self.identity, "versions": versions(), **self.state}
        text = json.dumps(state).encode()
        tensors = {**self.tensors, "state": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        metadata = {"format": FORMAT, "version": VERSION, "checksum": _checksum(tensors)}
        files.write_bytes(path, safetensors.torch.save(tensors, metadata), overwrite=True)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Checkpoint:
        """The checkpoint in a file.

        Raises:
            UserError: it cannot be read, is something else, of another version, cut short or altered.
        """
        try:
            with safe_open(path, framework="pt") as stream:
                metadata = stream.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"{path} is no checkpoint of a training")
                if metadata.get("version") != VERSION:
                    raise UserError(
                        f"checkpoint {path} is of version {metadata.get('version')}, this package reads {VERSION}"
                    )
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"checkpoint {path} cannot be read, it is cut short or something else: {error}"
            ) from None
        if metadata.get("checksum") != _checksum(tensors):
            raise UserError(f"checkpoint {path} was altered since it was written: its checksum does not fit")
        try:
            state = json.loads(bytes(bytes_of(tensors.pop("state"))))
            step, identity = state.pop("step"), state.pop("identity")
            kinds = {"groups": list, "scheduler": dict, "python": list, "numpy": list}
            if not (isinstance(step, int) and isinstance(identity, dict) and "random torch" in tensors):
                raise TypeError
            if any(not isinstance(state[key], kind) for key, kind in kinds.items()):
                raise TypeError
        except (KeyError, TypeError, ValueError, RecursionError, AttributeError):
            raise UserError(f"checkpoint {path} lacks the state of a training") from None
        return Checkpoint(step, identity, tensors, state)

    def require(self, identity: dict[str, Any], path: Path) -> None:
        """Raises UserError, naming what differs, unless the training that wants to go on is the one that wrote it."""
        for key in {**self.identity, **identity}:
            there, here = self.identity.get(key), identity.get(key)
            if isinstance(there, dict) and isinstance(here, dict):
                changed = next(
                    (name for name in {**there, **here} if there.get(name) != here.get(name)), None
                )
                if changed is not None:
                    raise UserError(
                        f"checkpoint {path} is of another training: {changed} is {there.get(changed)} there and "
                        f"{here.get(changed)} here: give the same, or --overwrite to begin anew"
                    )
            elif there != here:
                raise UserError(
                    f"checkpoint {path} is of another training, not of the same {key}: give the same, or "
                    f"--overwrite to begin anew"
                )

    def weights(self, kind: str, adapters: Mapping[str, Tensor]) -> list[Tensor]:
        """The weights of a kind, "adapter" or "good", in the order of `adapters`.

        Raises:
            UserError: others than those, or of another shape or dtype.
        """
        found = [self.tensors.get(f"{kind} {name}") for name in adapters]
        for name, tensor, like in zip(adapters, found, adapters.values(), strict=True):
            if tensor is None or (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
                raise UserError(f"the checkpoint has no fitting {kind} weight for {name}")
        return [tensor for tensor in found if tensor is not None]

    def restore_optimizer(self, optimizer: Any, scheduler: Any) -> None:
        """Give an optimizer and its scheduler, made as the original ones, their state."""
        values: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            kind, *rest = name.split(" ")
            if kind == "optimizer":
                values.setdefault(int(rest[0]), {})[rest[1]] = tensor.clone()
        optimizer.load_state_dict({"state": values, "param_groups": self.state["groups"]})
        scheduler.load_state_dict(self.state["scheduler"])

    def restore_random(self, generators: Generators, device: torch.device) -> None:
        """Give the global generators and these the states that they had."""
        version, keys, gauss = self.state["python"]
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(tuple(self.state["numpy"]))  # noqa: NPY002
        torch.random.set_rng_state(self.tensors["random torch"])
        if f"random {device}" in self.tensors:
            torch.get_device_module(device).set_rng_state(self.tensors[f"random {device}"], device)
        for name, generator in generators.items():
            generator.set_state(self.tensors[f"random {name}"])


def identity(
    model: nn.Module,
    plan: str,
    train_examples: Sequence[Example],
    eval_examples: Sequence[Example] | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What tells one training from another: settings as they are, the rest as digests.

    Args:
        model: before adapters are attached. Of each weight up to 256 values, evenly spread, are hashed: enough to tell
            one fine-tuning of a model from another, and done in a moment.
        plan: as JSON.
        train_examples, eval_examples: hashed whole, in their order.
        settings: that the result depends on.
    """
    weights = (f"{name} {tuple(w.shape)} {w.dtype}".encode() for name, w in model.state_dict().items())
    samples = (bytes_of(_sample(weight)) for weight in model.state_dict().values())
    return {
        "model": _digest([*weights, *samples]),
        "plan": _digest([plan.encode()]),
        "training examples": _examples(train_examples),
        "held-out examples": _examples(eval_examples or ()),
        # In JSON's types, so that what is read back is equal.
        "settings": json.loads(json.dumps(settings)),
    }


def table(kind: type[Any], rows: Sequence[Any]) -> Tensor:
    """Instances of a dataclass of numbers as [rows, fields] float64, which holds floats and counts as they are.

    None becomes NaN, which no measurement that is kept is.
    """
    values = [[math.nan if value is None else value for value in vars(row).values()] for row in rows]
    return torch.tensor(values, dtype=torch.float64).view(-1, len(dataclasses.fields(kind)))


def records(kind: type[Any], of: Tensor) -> list[Any]:
    """The instances that `table` was made of."""
    counts = [field.type == "int" for field in dataclasses.fields(kind)]

    def restored(value: float, is_count: bool) -> float | None:
        if math.isnan(value):
            return None
        return int(value) if is_count else value

    return [kind(*map(restored, row, counts)) for row in of.tolist()]


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED]


def _examples(examples: Iterable[Example]) -> str:
    def plain(values: list[int] | int) -> list[int] | int:
        return values if isinstance(values, int) else list(values)

    return _digest([json.dumps([plain(one["input_ids"]), plain(one["labels"])]).encode() for one in examples])


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    shapes = [f"{name} {tuple(tensors[name].shape)} {tensors[name].dtype}".encode() for name in names]
    return _digest([*shapes, *(bytes_of(tensors[name]) for name in names)])


def _devices(tensors: Iterable[Tensor]) -> list[torch.device]:
    return sorted({tensor.device for tensor in tensors} - {torch.device("cpu")}, key=str)
