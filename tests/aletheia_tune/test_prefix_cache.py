"""The prefix cache: what is read is what would be computed, and nothing stale, torn or unasked for is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from aletheia_tune.errors import UserError
from aletheia_tune.layers import find_layers
from aletheia_tune.prefix import cut_prefix
from aletheia_tune.prefix_cache import PrefixCache, cache_prefix
from aletheia_tune.prefix_store import RowStore

Batch = dict[str, Tensor]
VOCABULARY = 61


def llama(**settings: object) -> PreTrainedModel:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, pad_token_id=0, **sizes, **settings)
    )


def gpt2(dropout: float = 0.0) -> PreTrainedModel:
    rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=5, n_head=4, n_positions=64, **rates)
    )


def gpt_neox() -> PreTrainedModel:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 4}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, **sizes))


def mixtral(**settings: object) -> PreTrainedModel:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 5, "num_attention_heads": 4}
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, num_local_experts=2, **sizes, **settings)
    )


def bloom() -> PreTrainedModel:
    """Its layers return attention weights as well, which nobody reads."""
    return BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=24, n_layer=5, n_head=4, pad_token_id=0)
    )


FAMILIES: dict[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "llama": (llama, ["q_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
    "gpt_neox": (gpt_neox, ["query_key_value"]),
    "mixtral": (mixtral, ["q_proj", "o_proj"]),
    "bloom": (bloom, ["query_key_value"]),
}


def adapted(model: PreTrainedModel | str, layers: tuple[int, ...] = (2, 4)) -> PeftModel:
    """A model in training mode with adapters that act (B is not zero) on the given layers."""
    torch.manual_seed(0)
    if isinstance(model, str):
        model = FAMILIES[model][0]()
    config = LoraConfig(
        r=3,
        target_modules=FAMILIES[model.config.model_type][1],
        layers_to_transform=list(layers),
        fan_in_fan_out=isinstance(model, GPT2LMHeadModel),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return peft_model.train()


def examples(count: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=draw).tolist()
    return [torch.randint(1, VOCABULARY, (length,), generator=draw) for length in lengths]


def padded(chosen: list[Tensor], side: str = "right", length: int = 12) -> Batch:
    ids = torch.zeros(len(chosen), length, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(chosen):
        start = length - len(example) if side == "left" else 0
        ids[row, start : start + len(example)] = example
        mask[row, start : start + len(example)] = 1
        # With padding before it, the first token would be predicted from padding, whose rows the cache leaves zero.
        labels[row, start + 1 : start + len(example)] = example[1:]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(chosen: list[Tensor]) -> Batch:
    ids = torch.cat(chosen)[None]
    positions = torch.cat([torch.arange(len(example)) for example in chosen])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def gradients(model: PeftModel, batch: Batch, **options: object) -> dict[str, Tensor]:
    model.zero_grad()
    result = model(**batch, **options)
    result.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": result.loss.detach(), **found}


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert all(value.abs().sum() > 0 for value in mine.values())
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-7, msg=name)


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def cached(model: PeftModel, directory: Path, gigabytes: float = 1.0) -> PrefixCache:
    return cache_prefix(model, cut_prefix(model), directory, gigabytes)


def counts(cache: PrefixCache) -> tuple[int, int, int]:
    return cache.hits, cache.stored, cache.recomputed


def only_file(directory: Path, name: str) -> Path:
    (path,) = directory.glob(f"*/{name}")
    return path


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hits_are_what_would_be_computed(tmp_path, family, side):
    batch = padded(examples(4), side)
    expected = gradients(adapted(family), batch)
    model = adapted(family)
    ran: list[nn.Module] = []
    find_layers(model).layers[0].get_submodule("mlp").register_forward_hook(lambda m, *_: ran.append(m))
    with cached(model, tmp_path) as cache:
        assert cache.reason == ""
        assert_equal(gradients(model, batch), expected)
        assert counts(cache) == (0, 4, 0)
        ran.clear()
        assert_equal(gradients(model, batch), expected)
        assert counts(cache) == (4, 4, 0)
        assert not ran
        assert cache.passed_by == 0
    cache.remove()  # a second time, without effect
    assert_equal(gradients(model, batch), expected)
    assert ran


def test_entries_serve_other_batches_and_other_paddings(tmp_path):
    some = examples(6)
    model = adapted("llama")
    plain = adapted("llama")
    with cached(model, tmp_path) as cache:
        model(**padded(some[:3]))
        model(**padded(some[3:], length=16))
        for order, length in (((5, 0, 3), 12), ((1, 4), 20), ((2,), 11)):
            batch = padded([some[index] for index in order], length=length)
            # Read in a batch of another size, rows differ from a computation there by rounding, if at all.
            assert_same(gradients(model, batch), gradients(plain, batch))
        assert counts(cache) == (6, 6, 0)
        # A batch of which one example is known: the other alone is computed.
        new = examples(1, seed=9)
        batch = padded([some[0], *new])
        assert_same(gradients(model, batch), gradients(plain, batch))
        assert counts(cache) == (7, 7, 0)


def test_left_padding_of_another_width_is_another_position(tmp_path):
    (example,) = examples(1)
    model = adapted("gpt2")  # absolute positions: columns, where none are given
    plain = adapted("gpt2")
    with cached(model, tmp_path) as cache:
        for length in (12, 15):
            batch = padded([example], "left", length)
            assert_same(gradients(model, batch), gradients(plain, batch))
        assert counts(cache) == (0, 2, 0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_examples_are_entries_of_their_own(tmp_path, family):
    some = examples(4)
    model, plain = adapted(family), adapted(family)
    with cached(model, tmp_path) as cache:
        for order in ((0, 1), (2, 3), (3, 0), (1, 2, 0)):
            batch = packed([some[index] for index in order])
            assert_same(gradients(model, batch, use_cache=False), gradients(plain, batch, use_cache=False))
        assert counts(cache) == (5, 4, 0)
        gradients(model, packed(some))
        assert cache.passed_by == 1
        assert "use_cache" in cache.passed_by_reason


def test_packed_examples_that_attend_to_each_other_go_past_it(tmp_path, monkeypatch):
    # What a model does that knows nothing of packing.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    batch = packed(examples(3))
    expected = gradients(adapted("llama"), batch, use_cache=False)
    model = adapted("llama")
    with cached(model, tmp_path) as cache:
        for _ in range(2):
            assert_equal(gradients(model, batch, use_cache=False), expected)
        assert counts(cache) == (0, 0, 0)
        assert cache.passed_by == 2
        assert "attend to each other" in cache.passed_by_reason


def test_layers_that_hand_on_more_are_refused(tmp_path):
    """T5's first layer makes the position biases that all later ones read."""
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 5, "num_heads": 4, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0, **sizes)
    )
    model = get_peft_model(model, LoraConfig(target_modules=r"decoder\.block\.[24]\..*\.(q|v)")).train()
    with cached(model, tmp_path / "cache") as cache:
        assert cache.reason == "later layers read more than hidden states of earlier ones"
        assert model(**padded(examples(1))).loss.isfinite()
    assert not (tmp_path / "cache").exists()


def test_another_process_reads_what_was_kept(tmp_path):
    batch = padded(examples(4))
    expected = gradients(adapted("llama"), batch)
    for counted in ((0, 4, 0), (4, 0, 0)):
        model = adapted("llama")
        with cached(model, tmp_path) as cache:
            assert_equal(gradients(model, batch), expected)
            assert counts(cache) == counted


def test_one_process_at_a_time(tmp_path):
    with cached(adapted("llama"), tmp_path), pytest.raises(UserError, match="in use by another process"):
        cached(adapted("llama"), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.init.normal_(model.get_input_embeddings().weight),
        lambda model: find_layers(model).layers[1].mlp.up_proj.weight.data.view(-1)[5].add_(1e-3),
        lambda model: model.get_base_model().set_attn_implementation("eager"),
        lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
        lambda model: model.to(torch.float64),
    ],
    ids=["embeddings", "one weight", "attention", "setting", "dtype"],
)
def test_another_prefix_reads_nothing(tmp_path, change):
    batch = padded(examples(4))
    model = adapted("llama")
    with cached(model, tmp_path):
        model(**batch)
    with torch.no_grad():
        change(model)
    expected = gradients(model, batch)
    with cached(model, tmp_path) as cache:
        assert_equal(gradients(model, batch), expected)
        assert counts(cache) == (0, 4, 0)


def test_other_adapters_and_upper_layers_share_entries(tmp_path):
    batch = padded(examples(4))
    for change in (
        lambda _: None,
        lambda model: nn.init.normal_(find_layers(model).layers[3].mlp.up_proj.weight),
    ):
        model = adapted("llama")
        change(model)
        with cached(model, tmp_path) as cache:
            model(**batch)
    assert counts(cache) == (4, 0, 0)


def test_changing_one_token_or_the_mode_is_another_entry(tmp_path):
    batch = padded(examples(2))
    model = adapted("llama")
    with cached(model, tmp_path) as cache:
        model(**batch)
        batch["input_ids"][1, 1] += 1 if batch["input_ids"][1, 1] < VOCABULARY - 1 else -1
        model(**batch)
        assert counts(cache) == (1, 3, 0)
        model.eval()
        model(**batch, use_cache=False)
        assert counts(cache) == (1, 5, 0)


def test_a_weight_changed_while_the_cache_is_in_force_is_an_error(tmp_path):
    model = adapted("llama")
    with cached(model, tmp_path), torch.no_grad():
        find_layers(model).layers[0].mlp.up_proj.weight.mul_(2)
        with pytest.raises(RuntimeError, match="have changed"):
            model(**padded(examples(1)))


@pytest.mark.parametrize("name", ["data", "index"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied"])
def test_damaged_files_are_noticed_and_rebuilt(tmp_path, name, damage):
    batch = padded(examples(4))
    model = adapted("llama")
    expected = gradients(model, batch)
    with cached(model, tmp_path):
        model(**batch)
    path = only_file(tmp_path, name)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(
        {"truncated": content[: len(content) * 2 // 3], "flipped": content, "emptied": b""}[damage]
    )
    with cached(model, tmp_path) as cache:
        assert_equal(gradients(model, batch), expected)
        assert cache.hits + cache.stored == 4
        assert cache.stored == {"truncated": cache.stored, "flipped": 1, "emptied": 4}[damage]
        assert cache.stored > 0
        assert cache.damaged > 0 or name == "index"
    with cached(model, tmp_path) as cache:
        assert_equal(gradients(model, batch), expected)
        assert counts(cache) == (4, 0, 0)


def test_a_file_truncated_under_the_open_cache_is_noticed(tmp_path):
    batch = padded(examples(4))
    model = adapted("llama")
    with cached(model, tmp_path) as cache:
        expected = gradients(model, batch)
        gradients(model, batch)
        with open(only_file(tmp_path, "data"), "r+b") as stream:
            stream.truncate(100)
        assert_equal(gradients(model, batch), expected)
        assert cache.damaged == 4
        assert "4 damaged" in str(cache)


def test_a_record_over_rows_that_were_overwritten_is_not_believed(tmp_path):
    rows = torch.arange(24.0).view(6, 4)
    keys = [bytes([number]) * 16 for number in range(3)]

    def opened() -> RowStore:
        return RowStore(tmp_path, 4, torch.float32, 10_000)

    store = opened()
    store.put(keys[0], rows[:1])
    store.put(keys[1], rows[1:3])
    store.close()
    with open(tmp_path / "data", "r+b") as stream:
        stream.truncate(20)  # the second entry's rows are gone, its record is not
    store = opened()
    assert keys[1] not in store
    store.put(keys[2], rows[3:6])
    store.close()
    store = opened()
    assert store.get(keys[1]) is None
    assert torch.equal(store.get(keys[2]), rows[3:6])
    store.put(keys[1], rows[1:3])
    assert torch.equal(store.get(keys[2]), rows[3:6])
    store.close()
    store = opened()
    assert torch.equal(store.get(keys[1]), rows[1:3])
    assert torch.equal(store.get(keys[0]), rows[:1])
    store.close()


def test_what_does_not_fit_is_computed_every_time(tmp_path):
    some = examples(4)
    batch = padded(some)
    model = adapted("llama")
    expected = gradients(model, batch)
    bound = sum(len(example) for example in some[:2]) * 24 * 4
    with cached(model, tmp_path, bound / 2**30) as cache:
        for _ in range(3):
            assert_same(gradients(model, batch), expected)
        kept = 4 - cache.recomputed // 3
        assert 2 <= kept < 4
        assert counts(cache) == (2 * kept, kept, 3 * (4 - kept))
        assert "not kept" in str(cache)
    assert only_file(tmp_path, "data").stat().st_size <= bound
    nn.init.normal_(find_layers(model).layers[0].mlp.up_proj.weight)
    with cached(
        model, tmp_path, bound / 2**30
    ) as cache:  # another prefix, whose bound the first one has filled
        model(**batch)
        assert cache.recomputed > 0
    assert sum(path.stat().st_size for path in tmp_path.glob("*/data")) <= bound


@pytest.mark.parametrize(
    ("make", "layers", "reason"),
    [
        (lambda: gpt2(dropout=0.1), (2,), "dropout"),
        (lambda: llama(attention_dropout=0.1), (2,), "dropout"),
        (lambda: llama(), (0, 3), "no prefix"),
        (lambda: llama(output_hidden_states=True), (2,), "hidden states of every layer"),
        (lambda: mixtral(output_router_logits=True), (2,), "router"),
        (lambda: mixtral(router_jitter_noise=0.1), (2,), "noise"),
        (
            lambda: llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            (2,),
            "longest example",
        ),
    ],
    ids=["dropout", "attention dropout", "no prefix", "hidden states", "router", "jitter", "rotary"],
)
def test_refusals_say_why(tmp_path, make, layers, reason):
    model = adapted(make(), layers)
    with cached(model, tmp_path / "cache") as cache:
        assert reason in cache.reason
        assert str(cache) == f"none: {cache.reason}"
        model(**padded(examples(2)))
    assert not (tmp_path / "cache").exists()


def test_no_cut_an_adapter_below_and_running_statistics_are_refused(tmp_path):
    model = adapted("llama")
    model.get_input_embeddings().weight.requires_grad_()
    assert "embed_tokens" in cached(model, tmp_path).reason

    model = adapted("llama", (1, 3))
    for name, parameter in model.named_parameters():
        if "layers.1." in name:
            parameter.requires_grad_(False)
    assert "holds an adapter" in cached(model, tmp_path).reason

    model = adapted("llama")
    find_layers(model).layers[0].mlp.act_fn = nn.BatchNorm1d(40, affine=False)
    assert "running statistics" in cached(model, tmp_path).reason


def test_calls_that_it_cannot_serve_go_past_it(tmp_path):
    batch = padded(examples(3))
    model, plain = adapted("llama"), adapted("llama")
    holes = batch["attention_mask"].clone()
    holes[:, 1] = 0
    with cached(model, tmp_path) as cache:
        model(**batch)
        for change, reason in (
            ({"output_hidden_states": True}, "output_hidden_states"),
            ({"attention_mask": holes}, "holes"),
            ({"input_ids": None, "inputs_embeds": torch.ones(3, 12, 24)}, "input_ids"),
        ):
            before = cache.passed_by
            assert torch.equal(model(**{**batch, **change}).logits, plain(**{**batch, **change}).logits)
            assert cache.passed_by == before + 1
            assert reason in cache.passed_by_reason
        model.eval(), plain.eval()
        ids = batch["input_ids"][:1, :3]
        for _ in range(2):
            mine = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
            assert torch.equal(mine, plain.generate(input_ids=ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("reentrant", [True, False])
def test_with_gradient_checkpointing(tmp_path, reentrant):
    batch = padded(examples(4))
    expected = gradients(adapted("llama"), batch)
    model = adapted("llama")
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    model.get_base_model().enable_input_require_grads()
    with cached(model, tmp_path) as cache:
        for _ in range(3):
            assert_same(gradients(model, batch), expected)
        assert counts(cache) == (8, 4, 0)


def test_an_error_inside_the_model_leaves_its_forwards(tmp_path):
    model = adapted("llama")
    batch = padded(examples(2))
    expected = gradients(model, batch)
    layers = find_layers(model).layers
    with cached(model, tmp_path):
        model(**batch)

        def fail(*_: object) -> None:
            raise ValueError("planted")

        handle = layers[3].register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="planted"):
            model(**batch)
        handle.remove()
        assert not any("forward" in layer.__dict__ for layer in layers)
        assert_equal(gradients(model, batch), expected)


def test_a_size_that_cannot_be_meant(tmp_path):
    with pytest.raises(UserError, match="above 0"):
        cached(adapted("llama"), tmp_path, 0)
    (tmp_path / "file").write_text("")
    model = adapted("llama")
    layers = find_layers(model).layers
    hooks = [len(layer._forward_hooks) for layer in layers]
    with pytest.raises(UserError, match="another directory"):
        cached(model, tmp_path / "file")
    assert [len(layer._forward_hooks) for layer in layers] == hooks
