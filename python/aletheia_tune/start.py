"""Adapters that start where the gradient points: A spans the leading right singular directions of ∂loss/∂W, B is 0.

With B = 0 the model's function is unchanged, and stock PEFT loads the adapter with no correction of base weights.
The first step of gradient descent on B then has dB = s · dyᵀ (x Aᵀ) = s · G Aᵀ for G = ∂loss/∂W = dyᵀ x and scaling s,
and so changes W by −η s² G Aᵀ A: the step that full fine-tuning would make, projected on the rows of A. Where those
span the leading r right singular directions of G, that is its best approximation of rank r (Eckart and Young). LoRA-GA
(arXiv 2407.05000) aligns the first step with G too, with B ≠ 0 from G's left directions and a corrected base weight.

No gradient is held. As the backward pass meets each module, G enters two sketches, which several batches add up in:
Y = Gᵀ Ω [in, k] and Z = Ψ Gᵀ [l, out], both made from x and dy alone. From them come the leading directions of Gᵀ by
the one-pass method of Tropp, Yurtsever, Udell and Cevher (arXiv 1609.00048): Q from Y = Q R, X with Ψ Q X = Z by least
squares, and Q times the leading left singular vectors of X.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from aletheia_tune.errors import NonFiniteLoss, UserError
from aletheia_tune.head import labelled_head
from aletheia_tune.layers import bare_model
from aletheia_tune.lora_layers import is_lora_linear, undisturbed

_OVERSAMPLING = 8


class _Sketch:
    """Both sketches of one module's gradient G [out, in], summed over all calls.

    Attributes:
        test_out: Ω [out, k], standard normal, with k = 2 r + 8 where the matrix is that large. test_in: Ψᵀ [in, l],
            with l = 2 k + 1 likewise. range: Y [in, k]. rows: Z [l, out]. All float32.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, generator: torch.Generator, device: torch.device
    ) -> None:
        width = min(2 * rank + _OVERSAMPLING, in_features, out_features)
        height = min(2 * width + 1, in_features)
        self.test_out = torch.randn(out_features, width, generator=generator).to(device)
        self.test_in = torch.randn(in_features, height, generator=generator).to(device)
        self.range = torch.zeros(in_features, width, device=device)
        self.rows = torch.zeros(height, out_features, device=device)

    def add(self, x: Tensor, dy: Tensor) -> None:
        """One call's part of G = dyᵀ x; x [tokens, in], dy [tokens, out]."""
        x, dy = x.float(), dy.float()
        self.range += x.T @ (dy @ self.test_out)
        self.rows += (x @ self.test_in).T @ dy

    def right_directions(self, rank: int) -> Tensor:
        """[rank, in] float32 with orthonormal rows, the most important direction first."""
        basis = torch.linalg.qr(self.range).Q
        # Ψ Q has full rank; the default driver for CPUs would give other last bits every time.
        core = torch.linalg.lstsq(self.test_in.T @ basis, self.rows, driver="gels").solution
        left = torch.linalg.svd(core, full_matrices=False).U[:, :rank]
        return (basis @ left).T


def gradient_start(
    model: PeftModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    seed: int = 0,
    adapter_name: str = "default",
) -> None:
    """Starts a model's LoRA linears from the gradient that these batches' losses, added up, have at its base weights.

    A [r, in] gets orthogonal rows that span the leading right singular directions of the gradient, all of norm
    1 / √3, so that ‖A‖² = r / 3 is what PEFT's own initialisation (Kaiming, uniform in ±1 / √in) has on average; B is
    0. It costs one forward and one backward pass a batch, in evaluation mode, with logits for the labelled rows alone
    where the model's head allows it, and (k + l) · tokens · (in + out) multiply-adds a module, k and l as in
    `_Sketch`. Gradients of the adapters are None afterwards; all else is left as it was.

    Args:
        model: with adapters on linears, not yet on this package's operators.
        batches: what the model is called with, ``labels`` among it.
        seed: of the sketches; equal seeds give equal adapters.
        adapter_name: which adapter of the model.

    Raises:
        UserError: no batches; adapters on something else than linears; a rank above min(in, out); a module whose
            gradient is 0.
        NonFiniteLoss: a loss or gradient that is not finite; its ``step`` is 0.
    """
    if not batches:
        raise UserError("a start from the gradient needs at least one batch")
    generator = torch.Generator().manual_seed(seed)
    sketches: dict[str, tuple[Any, _Sketch]] = {}
    for name, module in bare_model(model).named_modules():
        if not (isinstance(module, LoraLayer) and adapter_name in module.r):
            continue
        if not is_lora_linear(module):
            raise UserError(f"a start from the gradient serves linears only, not {name!r}: use init default")
        layer: Any = module
        rank = layer.r[adapter_name]
        most = min(layer.in_features, layer.out_features)
        if rank > most:
            raise UserError(
                f"rank {rank} of {name!r} is above its gradient's, {most} at most: lower it or use init default"
            )
        device = layer.lora_A[adapter_name].weight.device
        sketches[name] = layer, _Sketch(layer.in_features, layer.out_features, rank, generator, device)
        nn.init.zeros_(layer.lora_B[adapter_name].weight)
    with undisturbed(model), torch.enable_grad(), labelled_head(model) as head:
        # Of the model alone, not of its parts, whose dropout stays off: in evaluation a head makes all logits.
        bare_model(model).training = head.active
        handles = [module.register_forward_hook(_watch(sketch)) for module, sketch in sketches.values()]
        try:
            for batch in batches:
                _backward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
            model.zero_grad()
    for name, (module, sketch) in sketches.items():
        size = float(sketch.range.abs().max() + sketch.rows.abs().max())
        if not math.isfinite(size):
            raise NonFiniteLoss(f"the gradient of {name!r} is not finite before training", step=0)
        if size == 0:
            raise UserError(f"the gradient of {name!r} is 0: leave it out of the plan or use init default")
        with torch.no_grad():
            directions = sketch.right_directions(module.r[adapter_name])
            module.lora_A[adapter_name].weight.copy_(directions / math.sqrt(3))


def _watch(sketch: _Sketch) -> Any:
    def on_forward(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        # The adapter is added to the base layer's output, so dy is the same for both.
        x = args[0].detach()
        y.register_hook(lambda dy: sketch.add(x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])))

    return on_forward


def _backward(model: PeftModel, batch: Mapping[str, Tensor]) -> None:
    device = next(model.parameters()).device
    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    if not math.isfinite(loss.item()):
        raise NonFiniteLoss(f"the loss is {loss.item()} before training", step=0)
    loss.backward()
