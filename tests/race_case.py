"""A race of three arms that nobody ran: its losses, times and plans are round numbers."""

from __future__ import annotations

import math

from aletheia_tune.metrics import EvalRecord, StepRecord, TrainResult
from aletheia_tune.plan import ModulePlan, Plan, make_plan
from aletheia_tune.race import ArmResult, RaceResult
from aletheia_tune.scores import ModuleScore, Scores
from aletheia_tune.training_config import TrainConfig

LAYERS = 6
MODULES = {
    "self_attn.q_proj": (32, 32, "attention"),
    "self_attn.o_proj": (32, 32, "attention"),
    "mlp.down_proj": (64, 32, "mlp"),
}
STEPS = 8


def scores() -> Scores:
    layers = tuple(3.0 + math.sin(2.3 * layer) for layer in range(LAYERS))
    modules = {
        f"model.layers.{layer}.{name}": ModuleScore(layer, layers[layer] / 3, *shape_and_kind)
        for layer in range(LAYERS)
        for name, shape_and_kind in MODULES.items()
    }
    meta = {"seconds": 7.5, "batches": 5, "tokens": 1234}
    return Scores("aletheia", layers, modules, "model.layers", meta)


def arm(name: str, plan: Plan, *, kernels: bool, step_seconds: float, final: float) -> ArmResult:
    history = tuple(
        StepRecord(
            i,
            i * step_seconds,
            step_seconds,
            2.0 - 0.1 * i,
            1e-4,
            0.7,
            400,
            0.25 * step_seconds,
            0.5 * step_seconds,
        )
        for i in range(1, STEPS + 1)
    )
    evals = (
        EvalRecord(0, 0.0, 2.0),
        EvalRecord(STEPS // 2, STEPS // 2 * step_seconds, (2.0 + final) / 2),
        EvalRecord(STEPS, STEPS * step_seconds, final),
    )
    training = TrainResult(
        history=history,
        evals=evals,
        trainable_parameters=123_456,
        peak_memory_mb=2048.0,
        patch_report=None,
        head="labelled rows" if kernels else "all rows: kernels are off",
        attention="operator" if kernels else "the model's own: kernels are off",
        norms="9 norms and the rotary embedding" if kernels else "none: kernels are off",
        prefix_layers=0,
        stopped=None,
        config={**vars(TrainConfig(steps=STEPS, learning_rate=3e-4)), "kernels": kernels},
        versions={"python": "3.11.7", "torch": "2.13.0"},
    )
    return ArmResult(name, plan, kernels, training, 28.61, 28.93)


def result() -> RaceResult:
    everywhere = Plan(
        {name: ModulePlan(16, 32) for name in scores().modules},
        LAYERS,
        "model.layers",
        meta={"ranks": "uniform"},
    )
    planned = make_plan(scores(), layers=50, ranks="by-type", attention_rank=4, mlp_rank=11)
    arms = (
        arm("PEFT, uniform r=16", everywhere, kernels=False, step_seconds=4.0, final=1.4321),
        arm("uniform r=16, our kernels", everywhere, kernels=True, step_seconds=3.2, final=1.4333),
        arm("Aletheia <plan> & kernels", planned, kernels=True, step_seconds=2.5, final=1.4555),
    )
    meta = {
        "model": "m",
        "train": "train.jsonl",
        "eval": "eval.jsonl",
        "slice_steps": 4,
        "other_text": "Shakespeare",
        "allocator": "tuned",
    }
    return RaceResult(arms, meta)
