"""A model on the norm and rotary operators computes as before, and is as before afterwards."""

from __future__ import annotations

import contextlib
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama import modeling_llama

from aletheia_tune import norms
from aletheia_tune.norms import kernel_norms
from tests.training_case import loss_and_gradient

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**GROUPED))


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **GROUPED))


def gemma2() -> Gemma2ForCausalLM:
    return Gemma2ForCausalLM(Gemma2Config(head_dim=8, **GROUPED))


def mistral() -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(sliding_window=6, **GROUPED))


def olmo2() -> Olmo2ForCausalLM:
    return Olmo2ForCausalLM(Olmo2Config(**GROUPED))


def glm() -> GlmForCausalLM:
    return GlmForCausalLM(GlmConfig(head_dim=8, **GROUPED))


def neox() -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 64, (3, 20), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch) -> SimpleNamespace:
    """How often each operator was called."""
    count = SimpleNamespace(rms_norm=0, rotary=0)

    def counting(name, original):
        def call(*args, **kwargs):
            setattr(count, name, getattr(count, name) + 1)
            return original(*args, **kwargs)

        return call

    for name in ("rms_norm", "rotary"):
        monkeypatch.setattr(norms, name, counting(name, getattr(norms, name)))
    return count


def fresh(count: SimpleNamespace) -> None:
    count.rms_norm = count.rotary = 0


def randomise_norms(model: nn.Module) -> None:
    """Norm weights start as ones or zeros, under which an offset or a rounding could not show."""
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.normal_(parameter, 0.5, 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("build", "count"),
    [(llama, 5), (qwen3, 9), (gemma2, 9), (mistral, 5), (olmo2, 9)],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_same_loss_and_gradients(build, count, dtype, calls):
    model = build().train()
    randomise_norms(model)
    model.to(dtype)
    exact = build().double().train()
    exact.load_state_dict(model.state_dict())
    inputs = batch()
    exact_loss, exact_gradient = loss_and_gradient(exact, inputs)
    plain_loss, plain_gradient = loss_and_gradient(model, inputs)
    with kernel_norms(model) as state:
        assert (state.norms, state.rotary, state.reasons) == (count, True, ())
        fresh(calls)
        loss, gradient = loss_and_gradient(model, inputs)
    assert (calls.rms_norm, calls.rotary) == (count, 2)
    eps = torch.finfo(dtype).eps
    assert (loss - exact_loss).abs() <= 2 * (plain_loss - exact_loss).abs() + eps
    error, plain_error = (gradient - exact_gradient).norm(), (plain_gradient - exact_gradient).norm()
    assert error <= 2 * plain_error + 1e-5 * exact_gradient.norm()


@pytest.mark.parametrize("build", [llama, gemma2], ids=["llama", "gemma2"])
def test_everything_is_as_it_was_afterwards(build):
    model = build().bfloat16().train()
    inputs = batch()
    file = sys.modules[type(model).__module__]
    function = file.apply_rotary_pos_emb
    loss, gradient = loss_and_gradient(model, inputs)
    with contextlib.suppress(ZeroDivisionError), kernel_norms(model):
        assert file.apply_rotary_pos_emb is not function
        raise ZeroDivisionError
    assert file.apply_rotary_pos_emb is function
    assert not any("forward" in module.__dict__ for module in model.modules())
    after, gradient_after = loss_and_gradient(model, inputs)
    assert torch.equal(after, loss)
    assert torch.equal(gradient_after, gradient)


def test_entry_leaves_the_random_state_and_the_weights(calls):
    model = llama().bfloat16()
    before = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    with kernel_norms(model):
        pass
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before[1], strict=True))


def test_evaluation_and_generation_are_served_too(calls):
    model = llama().eval()
    ids = batch()["input_ids"][:1, :5]
    expected = model(ids).logits
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)
    with kernel_norms(model):
        fresh(calls)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert (calls.rms_norm, calls.rotary) == (5, 2)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = llama().train()
    inputs = batch()
    with kernel_norms(model):
        _, expected = loss_and_gradient(model, inputs)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        _, gradient = loss_and_gradient(model, inputs)
    torch.testing.assert_close(gradient, expected)


def test_autocast_runs_what_the_model_ran(calls):
    model = llama().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = loss_and_gradient(model, batch())
        with kernel_norms(model) as state:
            assert state.rotary
            fresh(calls)
            given = loss_and_gradient(model, batch())
    assert (calls.rms_norm, calls.rotary) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_a_compiled_model_is_left_to_its_compiler(calls):
    model = llama().train()
    expected = model(**batch()).loss
    with kernel_norms(model):
        fresh(calls)
        given = torch.compile(model, backend="eager")(**batch()).loss
    assert (calls.rms_norm, calls.rotary) == (0, 0)
    torch.testing.assert_close(given, expected)


def test_an_input_in_another_dtype_than_the_weight_falls_back(calls):
    norm = modeling_llama.LlamaRMSNorm(16)
    x = torch.randn(3, 16).bfloat16()
    expected = norm(x)
    with kernel_norms(norm) as state:
        assert state.norms == 1
        fresh(calls)
        assert torch.equal(norm(x), expected)
    assert calls.rms_norm == 0


def test_norms_that_are_replaced_hooked_or_something_else_are_left_alone_and_say_why():
    model = llama()
    first, second = model.model.layers
    own = first.input_layernorm.forward
    first.input_layernorm.forward = lambda x: own(x) * 2
    second.input_layernorm.register_forward_hook(lambda module, args, output: None)
    model.model.norm = nn.LayerNorm(32)
    with kernel_norms(model) as state:
        assert "forward" not in second.input_layernorm.__dict__
        assert state.norms == 2
    assert state.rotary
    assert sorted(state.reasons) == [
        "LayerNorm: it computes something else",
        "LlamaRMSNorm: a hook is registered on it",
        "LlamaRMSNorm: its forward is already replaced",
    ]
    assert str(state).startswith("2 norms and the rotary embedding; ")
    assert torch.equal(first.input_layernorm(torch.ones(1, 32)), 2 * own(torch.ones(1, 32)))


def test_an_interleaved_rotary_embedding_is_left_alone(calls):
    model = glm().train()
    expected = loss_and_gradient(model, batch())[0]
    with kernel_norms(model) as state:
        fresh(calls)
        loss = loss_and_gradient(model, batch())[0]
    assert (state.norms, state.rotary) == (5, False)
    assert state.reasons == ("rotary embedding: transformers.models.glm.modeling_glm computes it otherwise",)
    assert calls.rotary == 0
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_a_partial_rotary_embedding_is_served(calls):
    model = neox().train()
    assert model.config.rope_parameters["partial_rotary_factor"] < 1
    expected = loss_and_gradient(model, batch())
    with kernel_norms(model) as state:
        fresh(calls)
        given = loss_and_gradient(model, batch())
    assert (state.norms, state.rotary, calls.rotary) == (0, True, 2)
    assert state.reasons == ("5 × LayerNorm: it computes something else",)
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_calls_that_the_operator_does_not_serve_get_the_functions_own_answer():
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    calls = {
        "heads after tokens": lambda f: f(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2),
        "positional": lambda f: f(q.transpose(1, 2), k.transpose(1, 2), cos, sin, 2),
        "by name": lambda f: f(q=q, k=k, cos=cos, sin=sin),
        "mixed dtypes": lambda f: f(q.bfloat16(), k.bfloat16(), cos, sin),
        "angles with a gradient": lambda f: f(q, k, cos.clone().requires_grad_(), sin),
        "one angle a head": lambda f: f(q, k, torch.ones(1, 1, 8), sin),
    }
    original = modeling_llama.apply_rotary_pos_emb
    with kernel_norms(llama()) as state:
        assert state.rotary
        for what, call in calls.items():
            for given, expected in zip(
                call(modeling_llama.apply_rotary_pos_emb), call(original), strict=True
            ):
                assert torch.equal(given, expected), what
        with pytest.raises(RuntimeError):
            modeling_llama.apply_rotary_pos_emb(q, k, cos[..., :6], sin[..., :6])


def test_contexts_may_nest_overlap_and_run_beside_each_other():
    function = modeling_llama.apply_rotary_pos_emb
    one, two = kernel_norms(llama()), kernel_norms(llama())
    one.__enter__()
    wrapper = modeling_llama.apply_rotary_pos_emb
    two.__enter__()
    assert modeling_llama.apply_rotary_pos_emb is wrapper
    one.__exit__(None, None, None)
    assert modeling_llama.apply_rotary_pos_emb is wrapper
    two.__exit__(None, None, None)
    assert modeling_llama.apply_rotary_pos_emb is function

    models = [llama() for _ in range(4)]
    states: list[bool] = []

    def run(model: nn.Module) -> None:
        for _ in range(5):
            with kernel_norms(model) as state:
                states.append(state.rotary)

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states == [True] * 20
    assert modeling_llama.apply_rotary_pos_emb is function


def test_what_someone_put_over_it_stays(monkeypatch, calls):
    function = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", function)  # puts it back after the test
    with kernel_norms(llama()):
        beneath = modeling_llama.apply_rotary_pos_emb

        def theirs(*args):
            return beneath(*args)

        modeling_llama.apply_rotary_pos_emb = theirs
    assert modeling_llama.apply_rotary_pos_emb is theirs
    operands = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    fresh(calls)
    for given, expected in zip(theirs(*operands), function(*operands), strict=True):
        assert torch.equal(given, expected)
    assert calls.rotary == 0


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ("reference", "forced by ALETHEIA_BACKEND"),
        ("triton", "ALETHEIA_BACKEND=triton cannot serve rms_norm"),
    ],
)
def test_without_a_compiled_backend_nothing_is_touched(monkeypatch, wish, reason):
    monkeypatch.setenv("ALETHEIA_BACKEND", wish)
    model = llama()
    function = modeling_llama.apply_rotary_pos_emb
    with kernel_norms(model) as state:
        assert modeling_llama.apply_rotary_pos_emb is function
        assert not any("forward" in module.__dict__ for module in model.modules())
    assert (state.norms, state.rotary) == (0, False)
    assert reason in " ".join(state.reasons)


def test_a_model_without_any_of_it():
    model = nn.Sequential(nn.Linear(3, 3))
    with kernel_norms(model) as state:
        pass
    assert (state.norms, state.rotary) == (0, False)
    assert state.reasons == ("the modeling file has no rotary function of q, k, cos and sin",)
