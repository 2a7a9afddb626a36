"""The labelled-rows head: the same loss and gradient as the model's own, and the model untouched afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Trainer,
    TrainingArguments,
)

from aletheia_tune.head import labelled_head

VOCABULARY = 97
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
TINY = dict(**SIZES, intermediate_size=40)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**TINY))


def gpt2() -> nn.Module:
    dropout = {"resid_pdrop": 0.1}
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, **dropout))


def gpt_neox() -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**TINY))


def phi() -> nn.Module:
    """Its head has a bias."""
    return PhiForCausalLM(PhiConfig(**TINY))


def mixtral() -> nn.Module:
    """It adds an auxiliary loss to what its loss function returns."""
    return MixtralForCausalLM(
        MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4, output_router_logits=True)
    )


def gemma2() -> nn.Module:
    """It caps its logits."""
    return Gemma2ForCausalLM(
        Gemma2Config(**TINY, num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0)
    )


class ScaledGemma2(Gemma2ForCausalLM):
    """It scales its logits besides, after the cap."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        logits = self.lm_head(
            self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        )
        cap = self.config.final_logit_softcapping
        logits = 1.01 * cap * torch.tanh(logits / cap)
        loss = self.loss_function(logits, labels, self.vocab_size)
        return type("Output", (), {"loss": loss, "logits": logits})


def scaled_gemma2() -> nn.Module:
    return ScaledGemma2(gemma2().config)


def capped_in_name_only() -> nn.Module:
    """Its configuration names a cap that its forward does not know."""
    model = llama()
    model.config.final_logit_softcapping = 5.0
    return model


def cohere() -> nn.Module:
    """It multiplies its logits by a number."""
    return CohereForCausalLM(CohereConfig(**TINY, logit_scale=0.25))


def masked_lm() -> nn.Module:
    return BertForMaskedLM(BertConfig(**TINY))


def classifier() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**TINY))


WITH_HEAD = [llama, gpt2, gpt_neox, phi, mixtral, gemma2, capped_in_name_only, cohere]


def build(builder) -> nn.Module:
    torch.manual_seed(0)
    model = builder().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def a_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (3, 10), generator=generator)
    labels = ids.clone()
    labels[0, :6] = -100
    labels[1] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradient(model: nn.Module, **batch) -> tuple[Tensor, Tensor]:
    """The loss and its gradient for the input embeddings, under equal random numbers."""
    torch.manual_seed(5)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    loss = model(inputs_embeds=embeddings, **batch).loss
    return loss.detach(), torch.autograd.grad(loss, embeddings)[0]


def named(builders) -> list:
    return [pytest.param(builder, id=builder.__name__) for builder in builders]


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("builder", named(WITH_HEAD))
def test_loss_and_gradient_are_the_models_own(builder, items):
    model = build(builder)
    extra = {} if items is None else {"num_items_in_batch": items}
    loss, gradient = loss_and_gradient(model, **a_batch(), **extra)
    with labelled_head(model) as head:
        assert head.active
        assert head.reason is None
        got, got_gradient = loss_and_gradient(model, **a_batch(), **extra)
    torch.testing.assert_close(got, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_gradient, gradient, rtol=1e-4, atol=1e-7)


def test_bfloat16_is_at_most_twice_as_far_off_as_the_models_own():
    narrow = build(llama).bfloat16()
    wide = build(llama).double()
    wide.load_state_dict(narrow.state_dict())
    truth_loss, truth = loss_and_gradient(wide, **a_batch())
    loss, gradient = loss_and_gradient(narrow, **a_batch())
    with labelled_head(narrow) as head:
        assert head.active
        got_loss, got = loss_and_gradient(narrow, **a_batch())
    assert (got_loss - truth_loss).abs() <= 2 * (loss - truth_loss).abs() + 1e-3
    assert (got - truth).norm() <= 2 * (gradient - truth).norm() + 1e-5


def test_shifted_labels_and_another_ignored_index():
    model = build(llama)
    batch = a_batch()
    labels = batch.pop("labels")
    shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    plain = model(**batch, labels=labels, shift_labels=shifted).loss
    other = model(**batch, labels=labels.masked_fill(labels == -100, 3), ignore_index=3).loss
    with labelled_head(model):
        torch.testing.assert_close(model(**batch, labels=labels, shift_labels=shifted).loss, plain)
        got = model(**batch, labels=labels.masked_fill(labels == -100, 3), ignore_index=3).loss
        torch.testing.assert_close(got, other)


@pytest.mark.parametrize("builder", named([llama, gemma2]))
def test_label_smoothing_is_torchs(builder):
    model = build(builder)
    batch = a_batch()
    logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    expected = nn.functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), labels.reshape(-1), label_smoothing=0.2
    )
    with labelled_head(model, label_smoothing=0.2) as head:
        assert head.active
        torch.testing.assert_close(model(**batch).loss, expected)


def test_the_trainers_own_label_smoothing_is_as_it_was(tmp_path):
    model = build(llama)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), label_smoothing_factor=0.2, report_to="none"))
    expected = trainer.compute_loss(model, a_batch())
    with labelled_head(model) as head:
        assert head.active
        torch.testing.assert_close(trainer.compute_loss(model, a_batch()), expected)


def test_no_labelled_row_is_what_transformers_makes_of_it():
    model = build(llama)
    batch = a_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with labelled_head(model):
        assert model(**batch).loss.isnan()
        assert model(**batch, num_items_in_batch=4).loss == 0
        assert model(**batch, num_items_in_batch=0).loss.isnan()
    assert model(**batch).loss.isnan()
    assert model(**batch, num_items_in_batch=4).loss == 0


def test_without_labels_the_model_makes_its_logits():
    model = build(llama)
    ids = a_batch()["input_ids"]
    expected = model(input_ids=ids).logits
    with labelled_head(model):
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(model(ids).logits, expected)
        model(**a_batch())
        assert torch.equal(model(input_ids=ids).logits, expected), (
            "a call with labels must leave nothing behind"
        )


@pytest.mark.parametrize("training_at_entry", [True, False])
def test_in_evaluation_the_logits_are_there_beside_the_loss(training_at_entry):
    model = build(llama).train(training_at_entry)
    batch = a_batch()
    expected = model.eval()(**batch)
    model.train(training_at_entry)
    with labelled_head(model) as head:
        assert head.active
        assert model.training is training_at_entry
        evaluated = model.eval()(**batch)
        assert torch.equal(evaluated.logits, expected.logits)
        assert torch.equal(evaluated.loss, expected.loss)
        assert model.train()(**batch).logits.shape[-1] == model.config.hidden_size


def test_labels_given_by_position():
    model = build(llama)
    batch = a_batch()
    arguments = (batch["input_ids"], None, None, None, None, batch["labels"])
    expected = model(*arguments).loss
    with labelled_head(model):
        out = model(*arguments)
    assert out.logits.shape[-1] == 32
    torch.testing.assert_close(out.loss, expected)


class LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_unlabelled_rows_make_no_logits():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, "vocab_size": 50_000})).requires_grad_(False)
    ids = torch.randint(50_000, (2, 40))
    labels = torch.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    with LargestTensor() as plain:
        model(input_ids=ids, labels=labels)
    assert plain.elements >= 80 * 50_000
    with labelled_head(model) as head, LargestTensor() as ours:
        model(input_ids=ids, labels=labels)
    assert head.active
    assert ours.elements <= 6 * 50_000


@pytest.mark.parametrize(
    ("builder", "reason"),
    [
        pytest.param(scaled_gemma2, "changes the logits", id="softcap-and-scale"),
        pytest.param(masked_lm, "cannot run|settable loss", id="masked-lm"),
        pytest.param(classifier, "no linear output embedding", id="classifier"),
        pytest.param(lambda: nn.Linear(3, 3), "no linear output embedding", id="no-model"),
    ],
)
def test_a_model_that_does_not_allow_it_is_left_as_it_is(builder, reason):
    model = build(builder)
    before = attributes(model)
    with labelled_head(model) as head:
        assert not head.active
        assert head.reason is not None
        assert pytest.importorskip("re").search(reason, head.reason), head.reason
        assert attributes(model) == before


def test_a_head_in_training_is_refused():
    model = build(llama)
    model.lm_head.weight.requires_grad_(True)
    with labelled_head(model) as head:
        assert head.reason == "its head is being trained"


def test_logits_changed_in_place_are_noticed():
    class InPlace(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            logits = self.lm_head(
                self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            )
            logits *= 0.5
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
            return type("Output", (), {"loss": loss, "logits": logits})

    torch.manual_seed(0)
    model = InPlace(LlamaConfig(**TINY)).requires_grad_(False)
    with labelled_head(model) as head:
        assert head.reason == "it changes the logits between head and loss"


def attributes(model: nn.Module) -> list:
    return [{key: id(value) for key, value in module.__dict__.items()} for module in model.modules()]


@pytest.mark.parametrize("builder", named([llama, gpt2, mixtral]))
def test_everything_is_put_back(builder):
    model = build(builder)
    model(**a_batch())
    before, loss, rng = attributes(model), model.loss_function, torch.get_rng_state()
    with labelled_head(model) as head:
        assert head.active
    assert attributes(model) == before
    assert model.loss_function is loss
    assert torch.equal(torch.get_rng_state(), rng)
    with pytest.raises(KeyError), labelled_head(model):
        raise KeyError
    assert attributes(model) == before


def test_a_loss_function_that_was_set_is_put_back():
    model = build(llama)

    def own(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs) -> Tensor:
        return 3.0 * nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1)
        )

    model.loss_function = own
    with labelled_head(model) as head:
        assert "its loss differs" in (head.reason or "")
    assert model.loss_function is own


def test_inside_peft():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(build(llama), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    batch = a_batch()
    expected = wrapped(**batch).loss
    with labelled_head(wrapped) as head:
        assert head.active
        out = wrapped(**batch)
    assert out.logits.shape[-1] == 32
    torch.testing.assert_close(out.loss, expected)
