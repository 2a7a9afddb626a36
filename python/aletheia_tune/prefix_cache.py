"""What the layers under the lowest adapter put out, computed once an example and kept on disk across epochs.

The model's own forward runs unchanged. Where every example of a batch is known, the layers of the prefix are
identities for that call, and the lowest adapted layer is given the kept rows in the place of what reached it. What is
not known is computed first, by the same forward with every layer above the prefix an identity.

An entry is one example: its real tokens without padding, under a key made of their ids and positions. That holds
because a prefix without dropout maps each example alone, whatever shares its batch, up to the rounding of matrix
products, whose order of summation may depend on how many rows the batch has.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aletheia_tune.classification import head_modules
from aletheia_tune.dora import is_dora
from aletheia_tune.environment import versions
from aletheia_tune.errors import UserError
from aletheia_tune.layers import bare_model, find_layers
from aletheia_tune.prefix import PrefixCut, parameters_above, replace_hidden_states
from aletheia_tune.prefix_store import DIGEST_BYTES, RowStore, bytes_of
from aletheia_tune.quantised import scheme_of, stored_parameters

_FORMAT = 1
# Settings that make a prefix depend on more than an example's tokens, or later layers on more than its output.
_REFUSED_SETTINGS = {
    "output_hidden_states": "the hidden states of every layer are asked for",
    "output_attentions": "the attention weights of every layer are asked for",
    "output_router_logits": "the router's loss reads the layers of the prefix",
    "num_kv_shared_layers": "later layers read the keys and values of earlier ones",
    "attention_chunk_size": "attention depends on where padding puts an example",
}
_CHANGING_ROTARY = ("dynamic", "longrope")
# Arguments of [batch, length] that the rows of an example depend on, and those that change nothing.
_KEYED = ("input_ids", "position_ids", "token_type_ids")
_HARMLESS = frozenset({"attention_mask", "use_cache", "return_dict", "num_items_in_batch", "labels"})


@dataclass(frozen=True)
class _Span:
    """Columns start to stop of a row of the batch: one example."""

    key: bytes
    row: int
    start: int
    stop: int


class PrefixCache:
    """A cache in force, made by `cache_prefix`.

    Attributes:
        reason: why there is no cache; empty when there is one.
        hits: examples whose rows were read.
        stored: examples whose rows were computed and kept.
        recomputed: examples whose rows were computed and not kept, because the size bound was reached or they were not
            finite.
        passed_by: calls of the model that ran without the cache, and `passed_by_reason` why the last of them did.
        directory: where the entries of this prefix are; None without a cache.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        self.hits = self.stored = self.recomputed = self.passed_by = 0
        self.passed_by_reason = ""
        self.directory: Path | None = None
        self._store: RowStore | None = None
        self._handles: list[RemovableHandle] = []

    @property
    def damaged(self) -> int:
        """Entries found truncated or changed on disk, and computed again where they were needed."""
        return 0 if self._store is None else self._store.damaged

    def __str__(self) -> str:
        if self.reason:
            return f"none: {self.reason}"
        text = f"{self.hits} examples read, {self.stored} computed and kept"
        if self.recomputed:
            text += f", {self.recomputed} computed and not kept (the size bound was reached)"
        if self.damaged:
            text += f", {self.damaged} damaged entries found"
        if self.passed_by:
            text += f", {self.passed_by} calls without it ({self.passed_by_reason})"
        return text

    def remove(self) -> None:
        """Take the cache out of the model and give its files back; the entries stay on disk."""
        if self._handles and self._store is not None:
            self._store.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> PrefixCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def cache_prefix(
    model: nn.Module, cut: PrefixCut, directory: str | os.PathLike[str], gigabytes: float = 8.0
) -> PrefixCache:
    """Keep what the layers under the cut put out, and run them only on examples not seen before.

    Entries are valid for one prefix: the weights of the embeddings and of the layers under the cut, of frozen LoRA
    adapters there as well, which of these act and at what scaling, the configuration, the forwards in use (attention
    implementation, this package's operators), dtype, device and package versions are hashed to the name of a
    subdirectory. Entries of another prefix are never read, and count towards the bound. While adapters of the prefix
    are switched otherwise than when the cache was made, calls go past it.

    Bitwise: rows are those that the model computed in the batch in which an example came first. Read in another
    batch they differ from a computation there by the rounding of the products, if the product's kernel sums in
    another order for another number of rows.

    Rows of padding are zero. Nothing reads them, unless the first token after padding on the left is labelled and so
    predicted from padding.

    Args:
        model: a causal language model, bare or wrapped by PEFT, to which operators have been applied already.
        cut: of this model, in force while the cache is.
        directory: where entries are kept; made if absent.
        gigabytes: size that all entries in `directory` may have at most, in 2³⁰ bytes; what does not fit is
            computed anew every time, and nothing is ever deleted to make room.

    Returns:
        The cache, to be undone by its `remove()` before the cut and the operators are. There is none, and `reason`
        says why, when there is no cut or nothing under it, or when the output of the prefix is not a function
        of an example's tokens alone: dropout, noise, running statistics or adapters other than LoRA's and DoRA's of
        whole modules in it.

    Raises:
        UserError: the size is not positive, the directory cannot be used, or another process has it open.
    """
    if not gigabytes > 0:
        raise UserError(f"prefix cache of {gigabytes} GiB: give a size above 0")
    if cut.lowest_layer is None:
        return PrefixCache(cut.reason)
    if cut.lowest_layer == 0:
        return PrefixCache("the first layer is adapted: there is no prefix")
    prefix = _Prefix(model, cut.lowest_layer)
    reason = prefix.why_not()
    if reason:
        return PrefixCache(reason)
    cache = _ActiveCache(prefix, Path(directory), int(gigabytes * 2**30))
    if cache.reason:
        cache.remove()
    return cache


class _Prefix:
    """The part of a model that lies under its lowest adapted layer."""

    def __init__(self, model: nn.Module, depth: int) -> None:
        found = find_layers(model)
        self.bare = bare_model(model)
        self.transformer = _transformer_of(self.bare, found.path)
        self.below, self.above = list(found.layers)[:depth], list(found.layers)[depth:]
        after = [*self.above, *map(self.bare.get_submodule, head_modules(self.bare))]
        elsewhere = {id(module) for part in after for module in part.modules()}
        self.modules = {
            name: module for name, module in self.bare.named_modules() if id(module) not in elsewhere
        }
        self.adapted: dict[str, Any] = {
            name: module for name, module in self.modules.items() if hasattr(module, "adapter_layer_names")
        }
        later = parameters_above(model, found.layers)
        later |= {id(parameter) for layer in self.above for parameter in layer.parameters()}
        # One list of tensors, by which a change of weights is noticed as well.
        self.tensors = {
            f"{name}.{key}": tensor
            for name, module in self.modules.items()
            for key, tensor in (*stored_parameters(module).items(), *module._buffers.items())
            if tensor is not None and id(tensor) not in later
        }

    def why_not(self) -> str:
        """Why its output is not a function of an example's tokens alone; empty if it is."""
        if self.transformer is None:
            return "no part of the model takes input_ids down to its layers"
        for config in _configs(self.bare):
            for setting, why in _REFUSED_SETTINGS.items():
                if getattr(config, setting, None):
                    return f"{setting} is set: {why}"
            rotary = str(getattr(config, "rope_parameters", None))
            for kind in _CHANGING_ROTARY:
                if f"'{kind}'" in rotary:
                    return f"{kind} rotary embeddings depend on the longest example seen"
        for name, module in self.adapted.items():
            # The adapter of a parameter replaces that parameter during each forward pass.
            if not isinstance(module, LoraLayer) or hasattr(module, "parameter_name"):
                return f"{name} in the prefix holds an adapter other than LoRA's of a whole module"
            for adapter, variant in module.lora_variant.items():
                if not is_dora(module, adapter):
                    return f"{name} in the prefix holds an adapter that is a {type(variant).__name__}"
        for name, module in self.modules.items():
            if (scheme := scheme_of(module)) is not None and scheme.mixes_rows:
                return f"{name} in the prefix is a {type(module).__name__}, whose rounding mixes examples"
            if getattr(module, "track_running_stats", False):
                return f"{name} in the prefix tracks running statistics"
            for attribute, value in vars(module).items():
                drops = "drop" in attribute or (attribute == "p" and "Dropout" in type(module).__name__)
                if (drops or "jitter" in attribute) and type(value) in (int, float) and value > 0:
                    what = "dropout" if drops else "noise"
                    return f"{name} in the prefix has {what} ({attribute} {value}): set it to 0"
        if any(tensor.requires_grad for tensor in self.tensors.values()):
            return "a parameter of the prefix is trainable"
        return ""

    def state(self) -> tuple[int, ...]:
        """Changes when a tensor is written to in place or given other memory."""
        return tuple(value for t in self.tensors.values() for value in (t.data_ptr(), t._version))

    def switches(self) -> list[Any]:
        """Which adapters act and at what scaling: what of them is in no tensor."""
        return [
            [
                list(module.active_adapters),
                module.disable_adapters,
                list(module.merged_adapters),
                list(module.scaling.items()),
                # PEFT hands a call's own choice of adapters on by hooks.
                len(module._forward_pre_hooks),
            ]
            for module in self.adapted.values()
        ]

    def fingerprint(self) -> str:
        """Hash of all that its output depends on, the tokens excepted."""
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        settings = [
            _FORMAT,
            versions(),
            torch.backends.cpu.get_cpu_capability(),
            [
                [{**config.to_dict(), "_name_or_path": ""}, str(config._attn_implementation)]
                for config in _configs(self.bare)
            ],
            [[name, _code_of(module)] for name, module in self.modules.items()],
            self.switches(),
        ]
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, tensor in self.tensors.items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device}".encode())
            digest.update(bytes_of(tensor))
        return digest.hexdigest()


class _ActiveCache(PrefixCache):
    def __init__(self, prefix: _Prefix, directory: Path, capacity: int) -> None:
        super().__init__()
        assert prefix.transformer is not None
        self._prefix, self._transformer = prefix, prefix.transformer
        self._signature = inspect.signature(type(self._transformer).forward)
        self._state, self._switches = prefix.state(), prefix.switches()
        name = prefix.fingerprint()
        # Entries of other prefixes count towards the bound: they are the user's to delete.
        others = sum(path.stat().st_size for path in directory.glob("*/data") if path.parent.name != name)
        # Why examples packed into a row cannot be told apart; None until a packed batch has come.
        self._packing_reason: str | None = None
        # What a layer of the prefix returns for given hidden states; seen in the call that asks for one token's rows.
        self._as_output: Callable[[Tensor], Any] | None = None
        self._computing = False
        self._rows: Tensor | None = None
        self._serving = ExitStack()
        self._handles = [
            self._transformer.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._transformer.register_forward_hook(self._leave, always_call=True),
            prefix.below[0].register_forward_hook(self._see_output),
            # Before the cut's hook, which makes the rows require a gradient where a checkpoint needs that.
            prefix.above[0].register_forward_pre_hook(self._enter_lowest, with_kwargs=True, prepend=True),
        ]
        try:
            device = next(iter(prefix.tensors.values())).device
            token = {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=device)}
            rows = self._compute(token)
            if not self.reason and (rows.dim() != 3 or rows.shape[:2] != (1, 1)):
                self.reason = "hidden states are not [batch, length, width]"
            if not self.reason and self._more_is_read(token):
                self.reason = "later layers read more than hidden states of earlier ones"
            if not self.reason:
                self.directory = directory / name
                self._store = RowStore(self.directory, rows.shape[2], rows.dtype, capacity - others)
        except BaseException:
            self.remove()
            raise

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._computing:
            return None
        if self._prefix.state() != self._state:
            raise RuntimeError(
                "weights under the cut have changed since cache_prefix: remove() this cache and make a new one"
            )
        bound = self._signature.bind(module, *args, **kwargs)
        arguments: dict[str, Any] = {}
        for name, value in list(bound.arguments.items())[1:]:
            by_name = self._signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
            arguments.update({name: value} if by_name else value)
        keeps_keys = arguments.get("use_cache")
        if keeps_keys is None:
            keeps_keys = getattr(module.config, "use_cache", False)
        reason = _why_not_this(arguments, keeps_keys and not module.training)
        if self._prefix.switches() != self._switches:
            reason = "adapters in the prefix are switched otherwise than when the cache was made"
        spans = [] if reason else _spans(arguments, module.training)
        if any(later.row == span.row for span, later in pairwise(spans)):
            reason = self._why_not_packed(arguments, spans, keeps_keys)
        if reason or not spans:
            self.passed_by += 1
            self.passed_by_reason = reason or "an attention mask that is empty or has holes in a row"
            return None
        if keeps_keys:
            # Nothing generates from a training pass, and keys of the layers that are skipped would be missing.
            arguments["use_cache"] = False
        self._rows = self._gather(spans, arguments)
        self._serving.enter_context(self._identities(self._prefix.below))
        return (), arguments

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._computing:
            self._serving.close()
            self._rows = None

    def _see_output(self, layer: nn.Module, args: Any, output: Any) -> None:
        if not self._computing or self._as_output is not None:
            return
        if isinstance(output, Tensor):
            self._as_output = _itself
            return
        if not isinstance(output, tuple) or not all(
            value is None or (isinstance(value, Tensor) and value.is_floating_point()) for value in output[1:]
        ):
            self.reason = "the layers return something other than tensors"
            output = ()
        # Attention weights, which nobody reads, or position biases, which later layers do: NaN shows which.
        beside = [None if value is None else torch.full_like(value, math.nan) for value in output[1:]]
        self._as_output = lambda hidden: (hidden, *beside)

    def _enter_lowest(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._computing:
            self._rows = args[0] if args else kwargs["hidden_states"]
        elif (rows := self._rows) is not None:
            return replace_hidden_states(args, kwargs, lambda _: rows)
        return None

    @contextmanager
    def _identities(self, layers: list[nn.Module]) -> Iterator[None]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            assert self._as_output is not None
            return self._as_output(args[0] if args else kwargs["hidden_states"])

        before = [layer.__dict__.get("forward") for layer in layers]
        for layer in layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                del layer.forward
                if own is not None:
                    layer.forward = own

    def _compute(self, arguments: Mapping[str, Any]) -> Tensor:
        """What the prefix puts out [batch, length, width], by the model's own forward."""
        self._computing = True
        try:
            with torch.no_grad(), self._identities(self._prefix.above):
                self._transformer(**arguments)
            assert self._rows is not None
            return self._rows
        finally:
            self._computing = False
            self._rows = None

    def _more_is_read(self, arguments: Mapping[str, Any]) -> bool:
        """Whether what the prefix's layers return beside hidden states reaches the output."""
        self._computing = True
        try:
            with torch.no_grad(), self._identities(self._prefix.below):
                return bool(self._transformer(**arguments)[0].isnan().any())
        finally:
            self._computing = False
            self._rows = None

    def _why_not_packed(self, arguments: dict[str, Any], spans: list[_Span], keeps_keys: bool) -> str:
        if keeps_keys:
            return "examples packed into a row while use_cache is on, which joins them"
        if self._packing_reason is None:
            # Rows of the last example must not change when all tokens of the first do: asked once, exactly.
            first, last = spans[0], [span for span in spans if span.row == spans[0].row][-1]
            ids = arguments["input_ids"].clone()
            before = self._compute(arguments)[last.row, last.start : last.stop]
            part = ids[first.row, first.start : first.stop]
            part.copy_((part == 0).to(ids.dtype))
            after = self._compute({**arguments, "input_ids": ids})[last.row, last.start : last.stop]
            apart = torch.equal(before, after)
            self._packing_reason = (
                "" if apart else "examples packed into a row attend to each other in this model"
            )
        return self._packing_reason

    def _gather(self, spans: list[_Span], arguments: dict[str, Any]) -> Tensor:
        """Hidden states [batch, length, width] that enter the lowest adapted layer, zero where there is padding."""
        store = self._store
        assert store is not None
        ids = arguments["input_ids"]
        kept = [store.get(span.key) for span in spans]
        missing = sorted({span.row for span, rows in zip(spans, kept, strict=True) if rows is None})
        computed: dict[int, Tensor] = {}
        if missing:
            sub = {
                name: value[missing]
                if isinstance(value, Tensor) and value.shape[:1] == ids.shape[:1]
                else value
                for name, value in arguments.items()
            }
            computed = dict(zip(missing, self._compute(sub), strict=True))
        hidden: Tensor | None = None
        for span, rows in zip(spans, kept, strict=True):
            if rows is None:
                rows = computed[span.row][span.start : span.stop]
                # What is not finite may be this batch's misfortune, and would be everyone's who reads it.
                if bool(rows.isfinite().all()) and store.put(span.key, rows):
                    self.stored += 1
                else:
                    self.recomputed += 1
            else:
                self.hits += 1
            if hidden is None:
                hidden = torch.zeros(*ids.shape, rows.shape[1], dtype=rows.dtype, device=ids.device)
            hidden[span.row, span.start : span.stop] = rows
        assert hidden is not None
        return hidden


def _itself(hidden: Tensor) -> Tensor:
    return hidden


def _why_not_this(arguments: Mapping[str, Any], generates: bool) -> str:
    """Why a call of the transformer cannot be served; empty if it can."""
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return "a call without input_ids"
    if torch.is_autocast_enabled(ids.device.type):
        return "autocast is on"
    if generates:
        return "keys and values are kept for generation"
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == ids.shape):
        return "an attention mask that is not [batch, length]"
    for name, value in arguments.items():
        if value is None or value is False or name in _HARMLESS:
            continue
        if name not in _KEYED:
            return f"{name} is given"
        if value.dim() != 2 or value.shape[1] != ids.shape[1]:
            return f"{name} is not [batch, length]"
    return ""


def _spans(arguments: Mapping[str, Any], training: bool) -> list[_Span]:
    """The examples of a batch in order of row and column; none if a row's real tokens do not lie together."""
    ids, mask, positions = (arguments.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    assert ids is not None
    batch, length = ids.shape
    # Models that are given no positions count columns, padding included, or count the real tokens.
    columns = torch.arange(length).expand(batch, length)
    given = {name: value for name in _KEYED if (value := arguments.get(name)) is not None}
    parts = [value.cpu().expand(batch, -1) for value in given.values()]
    keyed = torch.stack([*parts, columns] if positions is None else parts, -1)
    # An operator may serve training passes alone, and round otherwise.
    seed = f"{list(given)} {training}".encode()
    spans = []
    for row in range(batch):
        bounds = [0, length]
        if mask is not None:
            real = mask[row].nonzero().flatten().tolist()
            if not real or real[-1] - real[0] + 1 != len(real):
                return []
            bounds = [real[0], real[-1] + 1]
        elif positions is not None:
            steps = positions.cpu().expand(batch, -1)[row].diff()
            bounds[1:1] = ((steps != 1).nonzero().flatten() + 1).tolist()
        for start, stop in pairwise(bounds):
            digest = hashlib.blake2b(seed, digest_size=DIGEST_BYTES)
            digest.update(bytes_of(keyed[row, start:stop]))
            spans.append(_Span(digest.digest(), row, start, stop))
    return spans


def _transformer_of(bare: nn.Module, path: str) -> nn.Module | None:
    """The innermost module around the layers that takes `input_ids`."""
    while path:
        path = path.rpartition(".")[0]
        module = bare.get_submodule(path)
        if "input_ids" in inspect.signature(type(module).forward).parameters:
            return module
    return None


def _configs(bare: Any) -> list[Any]:
    config = bare.config
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def _code_of(module: nn.Module) -> str:
    forward: Any = module.forward
    code = forward if hasattr(forward, "__qualname__") else type(forward)
    return f"{type(module).__module__}.{type(module).__qualname__} {code.__module__}.{code.__qualname__}"
