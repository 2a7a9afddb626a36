"""One forward and backward pass a batch that measures every layer's gradient and leaves the model as it found it.

Every floating-point parameter tensor of every layer is accounted for exactly once:

* *observed*: a weight that only enters products y = x Wᵀ stays frozen. x is seen when the product runs and dy when the
  backward pass reaches it; the two make ‖∂loss/∂W‖ = ‖dyᵀ x‖ without that gradient ever being held.
* *ordinary*: everything else (norm weights, biases, whatever is used in another way) requires a gradient; a hook takes
  its norm and drops it at once.

Products are seen as they are called (:class:`torch.overrides.TorchFunctionMode`), so a linear, GPT-2's Conv1D, a router
and the slices of a stacked MoE expert parameter are one case. A weight that is found to be used in another way, or in
no way that can be seen, becomes ordinary and the batch's forward pass is run again: accounting stays exact.

A quantised weight has no gradient of its own: what is accounted for is that of the weight it is dequantised to, from
the x and dy of its linear, which is observed as a module.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from aletheia_kernels import weight_grad_norm_sq, weight_grad_norm_sq_sketch
from aletheia_tune.environment import peak_memory_mb
from aletheia_tune.errors import NonFiniteLoss, UserError
from aletheia_tune.head import labelled_head
from aletheia_tune.layers import bare_model, bare_modules, find_layers, kind_of, linears
from aletheia_tune.quantised import kept_layout, scheme_of
from aletheia_tune.scores import ModuleScore, Scores
from aletheia_tune.scores.activation import Activation
from aletheia_tune.scores.cka import Cka, Pooling
from aletheia_tune.scores.collector import Collector, ForwardObserver, GradientObserver
from aletheia_tune.scores.energy import Energy
from aletheia_tune.scores.fisher import FisherScore
from aletheia_tune.scores.gradient import GradientScore
from aletheia_tune.scores.hybrid import Hybrid
from aletheia_tune.scores.saliency import Saliency

METHODS = ("aletheia", "fisher", "saliency", "energy", "hybrid", "activation", "cka")
_EXACT_ONLY = ("energy", "hybrid")
FAITHFUL_BATCHES = 5
FAITHFUL_SEED = 42
WHOLE = -1  # in place of a matrix index: the parameter as a whole
# float16 holds 6e-8 to 65504: a backward pass in it leaves that range at either end. The loss is scaled as PyTorch's
# GradScaler scales it at first, and by less until every gradient is finite.
_FIRST_SCALE, _LAST_SCALE, _BACKOFF = 2.0**16, 2.0**-16, 2.0**-4

# Products y = x W (+ something): where x and W stand among the arguments and whether W is given as [out, in].
_PRODUCTS: dict[Any, tuple[int, int, bool]] = {
    torch.nn.functional.linear: (0, 1, True),
    torch.matmul: (0, 1, False),
    torch.Tensor.matmul: (0, 1, False),
    torch.Tensor.__matmul__: (0, 1, False),
    torch.mm: (0, 1, False),
    torch.Tensor.mm: (0, 1, False),
    torch.bmm: (0, 1, False),
    torch.Tensor.bmm: (0, 1, False),
    torch.addmm: (1, 2, False),
    torch.Tensor.addmm: (1, 2, False),
    torch.baddbmm: (1, 2, False),
    torch.Tensor.baddbmm: (1, 2, False),
}


def _root(tensor: Tensor) -> Tensor:
    base = tensor._base
    return tensor if base is None else base


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _unscaled(gradient: Tensor, scale: float) -> Tensor:
    """The gradient of the loss from that of scale · loss, in float32 unless they are one."""
    return gradient if scale == 1.0 else gradient.float() / scale


def _recall(x: Tensor) -> Callable[[], Tensor]:
    """How to have x again when the backward pass comes for it.

    Where x is an elementwise product whose two operands autograd keeps anyway (SwiGLU's act(gate) ⊙ up, the largest x
    of a layer, and w ⊙ h of an RMSNorm with a trained weight), it is made again from them, bit for bit, and not kept
    a third time. Any other x is kept by reference, so that siblings share one.
    """
    node = x.grad_fn
    while node is not None and node.name() in (
        "ViewBackward0",
        "UnsafeViewBackward0",
        "ReshapeAliasBackward0",
    ):
        node = node.next_functions[0][0]
    if node is not None and node.name() == "MulBackward0":
        saved: Any = node
        if saved._saved_self is not None and saved._saved_other is not None:
            return lambda: saved._saved_self * saved._saved_other
    kept, version = x.detach(), x._version

    def recall() -> Tensor:
        if kept._version != version:
            raise RuntimeError(
                "probe: the input of a linear was overwritten after use; its gradient cannot be had"
            )
        return kept

    return recall


@dataclass
class _Region:
    """One whole weight matrix: a 2-D parameter, or one expert of a 3-D one.

    A matrix used in several products of one pass has the sum of their gradients, which is the gradient of one product
    with all their rows: pairs are collected until every call has had its dy.
    """

    calls: int = 0
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class _Products(TorchFunctionMode):
    """Sees every product with a watched weight and shows its gradient's two factors during the backward pass.

    Args:
        watched: the frozen parameters to be observed, by name.
        observers: each is shown every matrix's gradient once.
        scale: of the loss; the observers see what it is without.
    """

    def __init__(
        self, watched: Mapping[str, Tensor], observers: Sequence[GradientObserver], scale: float
    ) -> None:
        super().__init__()
        self._scale = scale
        self._watched = {id(parameter): name for name, parameter in watched.items()}
        self._observers = observers
        self._regions: dict[tuple[str, int], _Region] = {}
        self.in_products: set[str] = set()
        self.elsewhere: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = _PRODUCTS.get(func)
        if product is not None and len(args) > product[1] and kwargs.keys() <= {"bias"}:
            x_at, weight_at, transposed = product
            x, weight = args[x_at], args[weight_at]
            name = self._watched.get(id(_root(weight)))
            as_stored = None if name is None else self._lies_as_stored(weight, x)
            if name is not None and as_stored is not None:
                others = (*args[:weight_at], *args[weight_at + 1 :], *kwargs.values())
                self._note_uses(others, None)
                self.in_products.add(name)
                if not torch.is_grad_enabled():
                    return func(*args, **kwargs)
                if not x.requires_grad:
                    # Nothing under this product is trained, so no gradient would reach it.
                    x = x.detach().requires_grad_()
                    args = (*args[:x_at], x, *args[x_at + 1 :])
                y = func(*args, **kwargs)
                self._observe(name, x, weight, y, as_stored != transposed)
                return y
        out = func(*args, **kwargs)
        self._note_uses((*args, *kwargs.values()), out)
        return out

    def _note_uses(self, arguments: Iterable[Any], out: Any) -> None:
        """Marks watched weights that something other than a product makes a new floating-point tensor from."""
        for argument in _tensors(arguments):
            root = _root(argument)
            name = self._watched.get(id(root))
            if name is not None and (
                out is None or any(t.is_floating_point() and _root(t) is not root for t in _tensors((out,)))
            ):
                self.elsewhere.add(name)

    @staticmethod
    def _lies_as_stored(weight: Tensor, x: Tensor) -> bool | None:
        """Whether a weight argument lies as its parameter does (True) or transposed (False).

        None unless it is exactly one or all of the parameter's matrices, so that gradients of different regions never
        overlap.
        """
        root = _root(weight)
        if weight.dim() == 3:
            if x.dim() != 3 or weight.shape[0] != root.shape[0] or x.shape[0] != root.shape[0]:
                return None
        elif weight.dim() != 2:
            return None
        if (weight.storage_offset() - root.storage_offset()) % (root.shape[-2] * root.shape[-1]):
            return None
        for view, as_stored in ((weight, True), (weight.mT, False)):
            if view.shape[-2:] == root.shape[-2:] and view.stride()[-2:] == root.stride()[-2:]:
                return as_stored
        return None

    @contextmanager
    def calls_of(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Observes the calls of linears, y = x Wᵀ, whose products are hidden, by the name of their weight."""

        def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            # Nothing under this product is trained, so no gradient would reach it.
            graph = torch.is_grad_enabled() and not args[0].requires_grad
            return (args[0].detach().requires_grad_(), *args[1:]) if graph else None

        def after(name: str, _module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            if torch.is_grad_enabled():
                self._observe_matrices(name, args[0], y, 0, None, x_first=False)

        with ExitStack() as stack:
            for name, module in modules.items():
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(partial(after, name)).remove)
            yield

    def _observe(self, name: str, x: Tensor, weight: Tensor, y: Tensor, x_first: bool) -> None:
        root = _root(weight)
        first = (weight.storage_offset() - root.storage_offset()) // (root.shape[-2] * root.shape[-1])
        self._observe_matrices(name, x, y, first, weight.shape[0] if weight.dim() == 3 else None, x_first)

    def _observe_matrices(
        self, name: str, x: Tensor, y: Tensor, first: int, stack: int | None, x_first: bool
    ) -> None:
        stacked = stack is not None
        experts = range(1 if stack is None else stack)
        regions = [self._regions.setdefault((name, first + expert), _Region()) for expert in experts]
        for region in regions:
            region.calls += 1
        # As stored the matrix is [m, n] with gradient aᵀ b: x is `a` where its rows are inputs, else dy is.
        recall: list[Callable[[], Tensor]] = [_recall(x)]

        def receive(dy: Tensor) -> None:
            operand, dy = recall.pop()().reshape(x_shape), _unscaled(dy, self._scale)
            for expert, region in zip(experts, regions, strict=True):
                x_rows = _rows(operand[expert] if stacked else operand).to(dy.dtype)
                dy_rows = _rows(dy[expert] if stacked else dy)
                region.pairs.append((x_rows, dy_rows) if x_first else (dy_rows, x_rows))
                if len(region.pairs) == region.calls:
                    self._finish(name, first + expert, region)

        x_shape = x.shape
        y.register_hook(receive)

    def _finish(self, name: str, index: int, region: _Region) -> None:
        pairs, region.pairs = region.pairs, []
        a, b = pairs[0] if len(pairs) == 1 else (torch.cat(parts) for parts in zip(*pairs, strict=True))
        with torch.no_grad():
            for observer in self._observers:
                observer.weight(name, index, a, b)

    def finish(self) -> None:
        """After the backward pass: matrices of which some call did not reach the loss."""
        for (name, index), region in self._regions.items():
            if region.pairs:
                self._finish(name, index, region)


@contextmanager
def _as_found(model: nn.Module, seed: int) -> Iterator[None]:
    """Whatever the probe changes inside is put back, also after an exception; random numbers start from the seed."""
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    checkpointed: list[Any] = [
        module for module in modules if getattr(module, "gradient_checkpointing", False)
    ]
    configs = {id(c): c for module in modules if hasattr(c := getattr(module, "config", None), "__dict__")}
    # Experts run one by one as plain products; a key-value cache would only hold memory.
    plain = {"_experts_implementation_internal": "eager", "use_cache": False}
    settings = [(config.__dict__, dict(config.__dict__)) for config in configs.values()]
    devices = sorted({p.device.index for p, _, _ in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            torch.default_generator.manual_seed(seed)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            model.train()
            for module in checkpointed:
                module.gradient_checkpointing = False
            for current, _ in settings:
                current.update({key: value for key, value in plain.items() if key in current})
            for parameter, _, _ in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            yield
        finally:
            for parameter, requires_grad, grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            for current, before in settings:
                current.clear()
                current.update(before)
            for module in checkpointed:
                module.gradient_checkpointing = True
            for module, training in modes:
                module.training = training


def _layer_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating-point parameters and quantised weights of the layers by bare name; a shared one has its first only."""
    layers = find_layers(model)
    found: dict[nn.Parameter, str] = {}
    for module_name, module in bare_modules(layers.layers, layers.path):
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if parameter.is_floating_point() or (
                name == f"{module_name}.weight" and scheme_of(module) is not None
            ):
                found.setdefault(parameter, name)
    return {name: parameter for parameter, name in found.items()}


def _quantised_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linears of the layers whose weight is quantised, by the name of that."""
    return {f"{each.name}.weight": module for each, module in linears(model) if scheme_of(module) is not None}


class _Weights(Mapping[str, Tensor]):
    """The weights that are scored, by name; a quantised one is dequantised whenever it is looked up, and not kept."""

    def __init__(self, plain: Mapping[str, Tensor], quantised: Mapping[str, nn.Module]) -> None:
        self._plain, self._quantised = plain, quantised

    def __getitem__(self, name: str) -> Tensor:
        module = self._quantised.get(name)
        scheme = None if module is None else scheme_of(module)
        return self._plain[name] if scheme is None else scheme.dequantised(module, torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)


@contextmanager
def _seen_forward(
    model: nn.Module, modules: Mapping[str, tuple[str, ModuleScore]], observers: Sequence[ForwardObserver]
) -> Iterator[None]:
    """Shows observers the hidden states between the layers and the inputs of the linears."""

    @torch.no_grad()
    def hidden(index: int, state: Tensor) -> None:
        for observer in observers:
            observer.hidden(index, state)

    @torch.no_grad()
    def linear_input(name: str, x: Tensor) -> None:
        for observer in observers:
            observer.linear(name, x)

    def before(show: Callable[[Tensor], None], module: nn.Module, args: Any, kwargs: Any) -> None:
        show(next(_tensors((*args, *kwargs.values()))))

    def after(show: Callable[[Tensor], None], module: nn.Module, args: Any, out: Any) -> None:
        show(next(_tensors((out,))))

    handles: list[RemovableHandle] = []
    try:
        if observers:
            layers = find_layers(model).layers
            first = partial(before, partial(hidden, 0))
            handles.append(layers[0].register_forward_pre_hook(first, with_kwargs=True))
            for index, layer in enumerate(layers, start=1):
                handles.append(layer.register_forward_hook(partial(after, partial(hidden, index))))
            for linear, module in linears(model):
                if linear.name in modules:
                    into = partial(before, partial(linear_input, modules[linear.name][0]))
                    handles.append(module.register_forward_pre_hook(into, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Norms:
    """The squared gradient norms of one batch.

    Args:
        norm_sq: b [tokens, n], a [tokens, m] -> (‖aᵀ b‖², standard error or None).
    """

    def __init__(self, norm_sq: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]) -> None:
        self._norm_sq = norm_sq
        self._matrices: dict[str, dict[int, tuple[Tensor, Tensor | None]]] = {}
        self._ordinary: dict[str, Tensor] = {}

    def weight(self, name: str, index: int, a: Tensor, b: Tensor) -> None:
        self._matrices.setdefault(name, {})[index] = self._norm_sq(b, a)

    def gradient(self, name: str, gradient: Tensor) -> None:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        self._ordinary[name] = torch.linalg.vector_norm(gradient, dtype=wide).square()

    def discard(self) -> None:
        """Forgets the batch."""
        self._matrices.clear()
        self._ordinary.clear()

    def take(self) -> dict[str, dict[int, tuple[float, float]]]:
        """{parameter: {matrix index or WHOLE: (‖g‖², standard error)}}; then empty for the next batch."""
        norms = {
            name: {
                index: (squared.item(), 0.0 if error is None else error.item())
                for index, (squared, error) in regions.items()
            }
            for name, regions in self._matrices.items()
        }
        norms.update({name: {WHOLE: (squared.item(), 0.0)} for name, squared in self._ordinary.items()})
        self.discard()
        return norms


class _Pass:
    """Forward and backward of one batch after another over a model made ready for it."""

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        quantised: Mapping[str, nn.Module],
        sketch: _Sketch | None,
        gradients: Sequence[GradientObserver],
        forward: Sequence[ForwardObserver],
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._quantised = quantised
        self._sketch = sketch
        self._norms = _Norms(_exact if sketch is None else sketch.norm_sq)
        self._observers = [self._norms, *gradients]
        self._forward_observers = forward
        self._watched = {
            name: parameter
            for name, parameter in parameters.items()
            if name not in quantised and parameter.dim() in (2, 3) and parameter.is_contiguous()
        }
        self._hooks = ExitStack()
        self._first = True
        # Of the loss; None in dtypes that have float32's range.
        narrow = any(parameter.dtype == torch.float16 for parameter in parameters.values())
        self.loss_scale = _FIRST_SCALE if narrow else None
        for name in parameters.keys() - self._watched.keys() - quantised.keys():
            self._make_ordinary(name)

    def __enter__(self) -> _Pass:
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    def _make_ordinary(self, name: str) -> None:
        parameter = self._parameters[name]
        self._watched.pop(name, None)

        def take(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = _unscaled(parameter.grad, self.loss_scale or 1.0)
            for observer in self._observers:
                observer.gradient(name, gradient)
            parameter.grad = None

        parameter.requires_grad_(True)
        self._hooks.callback(parameter.register_post_accumulate_grad_hook(take).remove)

    def _forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, _Products]:
        while True:
            for observer in self._forward_observers:
                observer.begin(batch)
            products = _Products(self._watched, self._observers, self.loss_scale or 1.0)
            with products, products.calls_of(self._quantised), torch.enable_grad():
                loss = self._model(**batch).loss
            unaccounted = products.elsewhere & self._watched.keys()
            if self._first:
                # Used in no way that was seen: by code that hides its products, or not at all. Autograd knows which.
                unaccounted |= self._watched.keys() - products.in_products
            if not unaccounted:
                self._first = False
                return loss, products
            for name in unaccounted:
                self._make_ordinary(name)

    def run(
        self, batch: Mapping[str, Any], number: int
    ) -> tuple[float, dict[str, dict[int, tuple[float, float]]]]:
        """The loss and, for each parameter that had a gradient, {matrix index or WHOLE: (‖g‖², standard error)}."""
        if self._sketch is not None:
            self._sketch.draw()
        while True:
            loss, products = self._forward(batch)
            if loss is None:
                raise UserError(f"probe: batch {number}: the model returned no loss; give labels")
            value = loss.item()
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"probe: batch {number}: the loss is {value}; "
                    "check for a batch without labels or a dtype too narrow",
                    step=number,
                )
            if loss.requires_grad:
                (loss if self.loss_scale is None else loss * self.loss_scale).backward()
            products.finish()
            norms = self._norms.take()
            finite = all(math.isfinite(squared) for each in norms.values() for squared, _ in each.values())
            if finite or self.loss_scale is None or self.loss_scale <= _LAST_SCALE:
                return value, norms
            self.loss_scale *= _BACKOFF
            for observer in self._observers:
                observer.discard()


def _exact(b: Tensor, a: Tensor) -> tuple[Tensor, None]:
    return weight_grad_norm_sq(b, a), None


class _Sketch:
    """Random directions Ω for ‖G Ω‖²: a matrix for each input size, new for every batch, from a private generator."""

    def __init__(self, columns: int, seed: int) -> None:
        self._columns = columns
        self._generator = torch.Generator().manual_seed(seed)
        self._omegas: dict[int, Tensor] = {}

    def draw(self) -> None:
        self._omegas.clear()

    def norm_sq(self, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        size = b.shape[1]
        if size not in self._omegas:
            self._omegas[size] = torch.randn(size, self._columns, generator=self._generator).to(
                b.device, b.dtype
            )
        return weight_grad_norm_sq_sketch(b, a, self._omegas[size])


def faithful_batches(
    examples: Sequence[Mapping[str, Any]], *, batches: int = FAITHFUL_BATCHES, seed: int = FAITHFUL_SEED
) -> list[dict[str, Tensor]]:
    """The batches that the authors' package would draw: batch 1, shuffled by a DataLoader seeded with 42, drop_last.

    Args:
        examples: each with ``input_ids`` (a list or 1-D tensor) and, where it is padded, ``attention_mask``.

    Returns:
        ``batches`` of them at most, {input_ids, attention_mask, labels} each [1, tokens] int64, labels = input_ids.

    Raises:
        UserError: no examples.
    """
    if not len(examples):
        raise UserError("probe: no examples; give a file with at least one")

    def collate(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = torch.as_tensor(rows[0]["input_ids"], dtype=torch.int64)[None]
        mask = rows[0].get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else torch.as_tensor(mask, dtype=torch.int64)[None]
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}

    loader: DataLoader[Any] = DataLoader(
        examples,  # type: ignore[arg-type]
        batch_size=1,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=collate,
    )
    return [batch for _, batch in zip(range(batches), loader, strict=False)]


def probe(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    method: str = "aletheia",
    exact: bool = True,
    sketch_columns: int = 16,
    rank: int = 16,
    pooling: Pooling = "last",
    faithful: bool = False,
    seed: int = 0,
) -> Scores:
    """Scores every layer and every linear by one forward and backward pass a batch.

    ``method="aletheia"`` is the published score (arXiv 2604.15351): the sum over batches and over the floating-point
    parameter tensors of a layer of their gradients' L2 norms; a module's score is the same sum for its weight alone.
    See :func:`probe_all`, which takes several methods over the same passes, for the rest.
    """
    made = probe_all(
        model,
        batches,
        (method,),
        exact=exact,
        sketch_columns=sketch_columns,
        rank=rank,
        pooling=pooling,
        faithful=faithful,
        seed=seed,
    )
    return made[method]


def probe_all(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    methods: Sequence[str] = METHODS,
    *,
    exact: bool = True,
    sketch_columns: int = 16,
    rank: int = 16,
    pooling: Pooling = "last",
    faithful: bool = False,
    seed: int = 0,
) -> dict[str, Scores]:
    """Several scores of the same model from the same forward and backward passes, one of each a batch.

    The model runs in train mode, as the published probe and as training do; where it is a causal language model whose
    head allows it, logits are made for the labelled rows only. Gradient checkpointing and adapters are switched off
    meanwhile. Everything that is changed is put back, also after an exception. In float16 the loss is scaled for the
    backward pass so that no gradient overflows, and the scale taken out of the gradients in float32.

    Args:
        model: a transformer, bare or in PEFT, of any floating dtype, on any device.
        batches: keyword arguments of the model's forward with labels, tensors on any device.
        methods: of "aletheia" (sum of gradient norms), "fisher" (of their squares), "saliency" (mean |W ⊙ G|), "energy"
            (share of the gradient's energy inside rank r), "hybrid" (saliency × energy outside rank r), "activation"
            (mean norm of a layer's output), "cka" (1 − CKA of a layer's input and output). What each of them is, and
            whose, stands at the top of its file in :mod:`aletheia_tune.scores`. The last two alone need no backward
            pass.
        exact: False estimates ‖G‖² of the weights by ‖G Ω‖² with random Ω; ``meta["standard_error"]`` by layer for
            "aletheia" and "fisher". "energy" and "hybrid" need True.
        sketch_columns: columns of Ω, at least 2.
        rank: r of "energy" and "hybrid", at least 1.
        pooling: of "cka", which token stands for an example: "last" as published, "last-content" or "mean".
        faithful: labels = input_ids, whatever labels the batches have. With the batches of :func:`faithful_batches`
            this is the authors' probe.
        seed: of dropout and of whatever is drawn.

    Returns:
        By method, Scores: layers, modules, and in ``meta``: model, dtype, device, batches, tokens, labelled_tokens,
        seconds (of all methods together), loss (mean), faithful, exact, stability (mean rank correlation between single
        batches' scores), head (why the plain head was used, or None), experts (by expert parameter, the sums of
        gradient norms for each expert, zero without a backward pass), peak_memory_bytes (of the process, or of the
        device), rank ("energy" and "hybrid"), pooling and samples ("cka"), loss_scale (float16).

    Raises:
        UserError: no known list of layers, no batches or labels, no methods or an unknown one, a gradient that is not
            finite, fewer than three examples for "cka".
        NonFiniteLoss: a loss that is not finite; ``step`` is the batch, counted from 1.
    """
    for method in methods:
        if method not in METHODS:
            raise UserError(f"probe: method {method!r} is not known; use one of {', '.join(METHODS)}")
        if not exact and method in _EXACT_ONLY:
            raise UserError(f"probe: method {method!r} needs exact norms; leave exact at True")
    if not methods:
        raise UserError(f"probe: no methods; give at least one of {', '.join(METHODS)}")
    if not exact and sketch_columns < 2:
        raise UserError(f"probe: sketch_columns is {sketch_columns}; give at least 2")
    if rank < 1:
        raise UserError(f"probe: rank is {rank}; give at least 1")
    bare = bare_model(model)
    layers = find_layers(model)
    parameters = _layer_parameters(model)
    layer_of = {name: int(name.removeprefix(f"{layers.path}.").split(".")[0]) for name in parameters}
    modules = _modules(model, parameters, layer_of)
    quantised = _quantised_linears(bare)
    weights = _Weights({name: parameters[name] for name, _ in modules.values()}, quantised)
    collectors = _collectors(methods, weights, layer_of, len(layers.layers), rank, pooling, seed)
    gradients = [each for each in collectors.values() if isinstance(each, GradientObserver)]
    forward = [each for each in collectors.values() if isinstance(each, ForwardObserver)]
    # Without parameters to account for there is nothing to differentiate: the pass ends with the loss.
    accounted = {} if len(forward) == len(collectors) else parameters
    observed = {name: module for name, module in quantised.items() if name in accounted}
    sketch = None if exact else _Sketch(sketch_columns, seed)
    device = next(bare.parameters()).device
    experts: dict[str, list[float]] = {
        name: [0.0] * p.shape[0] for name, p in parameters.items() if p.dim() == 3
    }
    losses: list[float] = []
    tokens = labelled = 0
    start = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(kept_layout(bare))
        stack.enter_context(_as_found(model, seed))
        if bare is not model:
            wrapper: Any = model
            stack.enter_context(wrapper.disable_adapter())
        head = stack.enter_context(labelled_head(bare))
        stack.enter_context(_seen_forward(bare, modules, forward))
        passes = stack.enter_context(_Pass(bare, accounted, observed, sketch, gradients, forward))
        for number, given in enumerate(batches, start=1):
            batch = {
                key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()
            }
            if faithful:
                batch["labels"] = batch["input_ids"].clone()
            if batch.get("labels") is None:
                raise UserError(f"probe: batch {number} has no labels; give them as training does")
            loss, norms = passes.run(batch, number)
            losses.append(loss)
            first = next(iter(batch.values()))
            tokens += int(batch["attention_mask"].sum()) if "attention_mask" in batch else first.numel()
            labelled += int((batch["labels"] != -100).sum())
            for name, regions in norms.items():
                if not all(math.isfinite(squared) for squared, _ in regions.values()):
                    raise UserError(
                        f"probe: batch {number}: the gradient of {name} (layer {layer_of[name]}) is not finite; "
                        "use a wider dtype, such as bfloat16 or float32"
                    )
                for index, (squared, _) in regions.items():
                    if name in experts and index != WHOLE:
                        experts[name][index] += math.sqrt(squared)
            squared_norms = {
                name: math.fsum(squared for squared, _ in regions.values()) for name, regions in norms.items()
            }
            standard_errors = {
                name: math.hypot(*(error for _, error in regions.values())) for name, regions in norms.items()
            }
            for collector in collectors.values():
                collector.add_batch(squared_norms, standard_errors)
    if not losses:
        raise UserError("probe: no batches; give at least one")
    meta: dict[str, Any] = {
        "model": getattr(getattr(bare, "config", None), "_name_or_path", "") or type(bare).__name__,
        "dtype": str(next(p for p in bare.parameters() if p.is_floating_point()).dtype).removeprefix(
            "torch."
        ),
        "device": str(device),
        "batches": len(losses),
        "tokens": tokens,
        "labelled_tokens": labelled,
        "seconds": time.perf_counter() - start,
        "loss": math.fsum(losses) / len(losses),
        "faithful": faithful,
        "exact": exact,
        "head": head.reason,
        "peak_memory_bytes": int(peak_memory_mb(device) * 1024**2),
    }
    if experts:
        meta["experts"] = experts
    if passes.loss_scale is not None:
        meta["loss_scale"] = passes.loss_scale
    if not exact:
        meta["sketch_columns"] = sketch_columns
    return {
        method: _scores(method, collectors[method], modules, layers.path, meta, exact) for method in methods
    }


def _collectors(
    methods: Sequence[str],
    weights: Mapping[str, Tensor],
    layer_of: Mapping[str, int],
    num_layers: int,
    rank: int,
    pooling: Pooling,
    seed: int,
) -> dict[str, Collector]:
    """A collector for every method, and for those that they build on."""
    made: dict[str, Collector] = {}
    if "aletheia" in methods:
        made["aletheia"] = GradientScore(layer_of, num_layers)
    if "fisher" in methods:
        made["fisher"] = FisherScore(layer_of, num_layers)
    if "saliency" in methods or "hybrid" in methods:
        made["saliency"] = saliency = Saliency(weights, layer_of, num_layers)
    if "energy" in methods or "hybrid" in methods:
        made["energy"] = energy = Energy(weights, layer_of, num_layers, rank, seed)
    if "hybrid" in methods:
        made["hybrid"] = Hybrid(saliency, energy, layer_of, num_layers)
    if "activation" in methods:
        linear = [name for name, weight in weights.items() if weight.dim() == 2]
        made["activation"] = Activation(linear, num_layers)
    if "cka" in methods:
        made["cka"] = Cka({name: layer_of[name] for name in weights}, num_layers, pooling)
    return made


def _scores(
    method: str,
    collector: Collector,
    modules: Mapping[str, tuple[str, ModuleScore]],
    layer_path: str,
    meta: Mapping[str, Any],
    exact: bool,
) -> Scores:
    own = {"stability": collector.stability, **collector.meta}
    if not exact and isinstance(collector, GradientScore):
        own["standard_error"] = list(collector.standard_error)
    by_parameter = collector.by_parameter
    scored = {
        name: replace(module, score=by_parameter[parameter])
        for name, (parameter, module) in modules.items()
        if parameter in by_parameter
    }
    return Scores(method, collector.by_layer, scored, layer_path, {**meta, **own})


def _modules(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], layer_of: Mapping[str, int]
) -> dict[str, tuple[str, ModuleScore]]:
    """Every linear and every stacked expert parameter: the name of its weight, and what it is, without a score yet."""
    name_of = {parameter: name for name, parameter in parameters.items()}
    modules: dict[str, tuple[str, ModuleScore]] = {}
    for linear, module in linears(model):
        # A weight that several linears share has one gradient, and each of them that score.
        name = name_of.get(module.weight)
        if name is not None:
            described = ModuleScore(linear.layer, 0.0, linear.in_features, linear.out_features, linear.kind)
            modules[linear.name] = (name, described)
    layers = find_layers(model)
    for module_name, module in bare_modules(layers.layers, layers.path):
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if name in parameters and parameter.dim() == 3:
                rows, columns = parameter.shape[-2:]
                if getattr(module, "is_transposed", False):
                    rows, columns = columns, rows
                kind = kind_of(name, layers.path)
                modules[name] = (name, ModuleScore(layer_of[name], 0.0, columns, rows, kind))
    return modules
