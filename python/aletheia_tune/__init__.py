"""Gradient-guided LoRA fine-tuning on transformers and PEFT.

The names below are imported when first used. The two functions that bear their module's name are imported
from it: `from aletheia_tune.probe import probe` and `from aletheia_tune.race import race`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aletheia_tune.errors import NonFiniteLoss, UserError

if TYPE_CHECKING:
    from aletheia_tune.budget import budget_plan, frontier
    from aletheia_tune.cost import Batch, Calibration, StepCost, calibrate, predict
    from aletheia_tune.data import Collator, Fields, load_examples
    from aletheia_tune.full import float32_weights
    from aletheia_tune.kernels import KernelsInUse, use_kernels
    from aletheia_tune.layers import positions_of
    from aletheia_tune.loading import load_model, load_shape
    from aletheia_tune.merge import merge_adapter
    from aletheia_tune.metrics import TrainResult
    from aletheia_tune.packing import PackingCollator
    from aletheia_tune.patch import PatchReport, apply_kernels, restore
    from aletheia_tune.plan import ModulePlan, Plan, make_plan, uniform_plan, unscored_plan
    from aletheia_tune.prefix import PrefixCut, cut_prefix
    from aletheia_tune.processes import plan_of_first, scores_of_all
    from aletheia_tune.race import Arm, RaceResult
    from aletheia_tune.scores import ModuleScore, Scores
    from aletheia_tune.scores.merge import merge_scores
    from aletheia_tune.separation import require_separation, why_not_shared
    from aletheia_tune.start import gradient_start
    from aletheia_tune.train import fine_tune
    from aletheia_tune.training_config import TrainConfig
    from aletheia_tune.whole_checkpoint import load_optimizer, save_checkpoint

_MODULE_OF = {
    "budget_plan": "budget",
    "frontier": "budget",
    "load_optimizer": "whole_checkpoint",
    "save_checkpoint": "whole_checkpoint",
    "Batch": "cost",
    "Calibration": "cost",
    "StepCost": "cost",
    "calibrate": "cost",
    "predict": "cost",
    "Collator": "data",
    "Fields": "data",
    "load_examples": "data",
    "float32_weights": "full",
    "KernelsInUse": "kernels",
    "use_kernels": "kernels",
    "positions_of": "layers",
    "merge_adapter": "merge",
    "PackingCollator": "packing",
    "PatchReport": "patch",
    "apply_kernels": "patch",
    "restore": "patch",
    "ModulePlan": "plan",
    "Plan": "plan",
    "make_plan": "plan",
    "uniform_plan": "plan",
    "unscored_plan": "plan",
    "PrefixCut": "prefix",
    "cut_prefix": "prefix",
    "plan_of_first": "processes",
    "scores_of_all": "processes",
    "Arm": "race",
    "RaceResult": "race",
    "ModuleScore": "scores",
    "Scores": "scores",
    "merge_scores": "scores.merge",
    "require_separation": "separation",
    "why_not_shared": "separation",
    "gradient_start": "start",
    "TrainConfig": "training_config",
    "TrainResult": "metrics",
    "fine_tune": "train",
    "load_model": "loading",
    "load_shape": "loading",
}

__all__ = [
    "Arm",
    "Batch",
    "Calibration",
    "Collator",
    "Fields",
    "KernelsInUse",
    "ModulePlan",
    "ModuleScore",
    "NonFiniteLoss",
    "PackingCollator",
    "PatchReport",
    "Plan",
    "PrefixCut",
    "RaceResult",
    "Scores",
    "StepCost",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "apply_kernels",
    "budget_plan",
    "calibrate",
    "cut_prefix",
    "fine_tune",
    "float32_weights",
    "frontier",
    "gradient_start",
    "load_examples",
    "load_model",
    "load_optimizer",
    "load_shape",
    "make_plan",
    "merge_adapter",
    "merge_scores",
    "plan_of_first",
    "positions_of",
    "predict",
    "require_separation",
    "restore",
    "save_checkpoint",
    "scores_of_all",
    "uniform_plan",
    "unscored_plan",
    "use_kernels",
    "why_not_shared",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
