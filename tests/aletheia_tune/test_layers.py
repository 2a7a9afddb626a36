"""Layers and linears are found by structure, under the names of the bare model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RoFormerConfig,
    RoFormerForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    YosoConfig,
    YosoForSequenceClassification,
)

from aletheia_tune.errors import UserError
from aletheia_tune.layers import (
    LinearModule,
    bare_model,
    bare_modules,
    find_layers,
    full_modules,
    linear_modules,
    positions_of,
)

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 31,
}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=1))


def test_llama():
    model = llama()
    found = find_layers(model)
    assert found.path == "model.layers"
    assert found.layers is model.model.layers
    modules = linear_modules(model)
    assert len(modules) == 3 * 7
    assert modules[0] == LinearModule("model.layers.0.self_attn.q_proj", 0, 16, 16, "attention")
    assert modules[1] == LinearModule("model.layers.0.self_attn.k_proj", 0, 16, 8, "attention")
    assert modules[-1] == LinearModule("model.layers.2.mlp.down_proj", 2, 24, 16, "mlp")
    order = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name
    ]
    assert [module.name for module in modules] == order


def test_gpt2_conv1d():
    modules = linear_modules(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=31)))
    assert modules[0] == LinearModule("transformer.h.0.attn.c_attn", 0, 16, 48, "attention")
    assert modules[2] == LinearModule("transformer.h.0.mlp.c_fc", 0, 16, 64, "mlp")
    assert len(modules) == 2 * 4


@pytest.mark.parametrize(
    ("model", "path", "kinds"),
    [
        (
            lambda: BertModel(BertConfig(**TINY)),
            "encoder.layer",
            {
                "attention.self.query": "attention",
                "attention.self.key": "attention",
                "attention.self.value": "attention",
                "attention.output.dense": "attention",
                "intermediate.dense": "mlp",
                "output.dense": "mlp",
            },
        ),
        (
            lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**TINY)),
            "gpt_neox.layers",
            {
                "attention.query_key_value": "attention",
                "attention.dense": "attention",
                "mlp.dense_h_to_4h": "mlp",
                "mlp.dense_4h_to_h": "mlp",
            },
        ),
        (
            lambda: OPTForCausalLM(
                OPTConfig(
                    hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=31
                )
            ),
            "model.decoder.layers",
            {
                "self_attn.k_proj": "attention",
                "self_attn.v_proj": "attention",
                "self_attn.q_proj": "attention",
                "self_attn.out_proj": "attention",
                "fc1": "mlp",
                "fc2": "mlp",
            },
        ),
        (
            lambda: MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=2)),
            "model.layers",
            {f"self_attn.{name}_proj": "attention" for name in "qkvo"},
        ),
    ],
    ids=["bert", "gpt-neox", "opt", "mixtral"],
)
def test_kinds_and_paths(model, path, kinds):
    model = model()
    assert find_layers(model).path == path
    modules = linear_modules(model)
    assert {m.name.removeprefix(f"{path}.0."): m.kind for m in modules if m.layer == 0} == kinds
    assert [m.layer for m in modules] == sorted(m.layer for m in modules)


def test_a_peft_model_has_the_names_of_the_model_it_wraps():
    peft = pytest.importorskip("peft")
    model = llama()
    before = linear_modules(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    assert linear_modules(wrapped) == before
    assert find_layers(wrapped).path == "model.layers"


def test_a_module_trained_in_full_is_shown_as_its_trained_copy_under_its_name():
    model = llama()
    before = [name for name, _ in bare_modules(model)]
    linears = linear_modules(model)
    full = "model.layers.1.mlp.up_proj"
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=[full])
    wrapped = get_peft_model(model, config)
    assert [name for name, _ in bare_modules(bare_model(wrapped))] == before
    assert linear_modules(wrapped) == linears
    assert find_layers(wrapped).path == "model.layers"
    (wrapper,) = full_modules(wrapped).values()
    assert dict(bare_modules(bare_model(wrapped)))[full] is wrapper.modules_to_save["default"]
    wrapper.set_adapter([])
    assert dict(bare_modules(bare_model(wrapped)))[full] is wrapper.original_module


def test_a_module_in_two_layers_comes_once():
    model = llama()
    model.model.layers[2].mlp = model.model.layers[0].mlp
    names = [module.name for module in linear_modules(model)]
    assert "model.layers.0.mlp.up_proj" in names
    assert "model.layers.2.mlp.up_proj" not in names


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(3))
        self.norm = nn.LayerNorm(2)


def two_lists(counts: tuple[int, int], **config) -> nn.Module:
    model = nn.Module()
    model.vision = nn.ModuleList(Block() for _ in range(counts[0]))
    model.text = nn.ModuleList(Block() for _ in range(counts[1]))
    model.config = type("Config", (), config)()
    return model


def test_the_outermost_list_whose_length_the_configuration_names():
    assert find_layers(two_lists((2, 4), num_hidden_layers=4)).path == "text"
    assert find_layers(two_lists((2, 4), n_layer=2)).path == "vision"


def test_no_list_and_too_many_are_errors_of_one_line():
    with pytest.raises(UserError, match=r"Linear: no list of transformer layers") as caught:
        find_layers(nn.Linear(2, 2))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"several lists.*vision \(4\), text \(4\)"):
        find_layers(two_lists((4, 4), num_hidden_layers=4))
    with pytest.raises(UserError, match="several lists"):
        find_layers(two_lists((2, 4)))


def test_the_text_tower_of_a_model_with_two():
    tower = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "num_hidden_layers": 3, "vocab_size": 31},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
    )
    with torch.device("meta"):
        model = CLIPModel(config)
    assert find_layers(model).path == "text_model.encoder.layers"


@pytest.mark.parametrize("depth", [2, 3])
def test_the_language_part_of_a_model_with_a_vision_tower_of_any_depth(depth):
    vision = {
        **TINY,
        "num_hidden_layers": depth,
        "image_size": 8,
        "patch_size": 4,
        "model_type": "clip_vision_model",
    }
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TINY, num_key_value_heads=1))
        )
    assert find_layers(model).path == "model.language_model.layers"


@pytest.mark.parametrize("depth", [2, 3])
def test_the_decoder_above_an_encoder_of_any_depth(depth):
    config = T5Config(
        d_model=16, d_kv=8, d_ff=24, num_heads=2, vocab_size=31, num_layers=depth, num_decoder_layers=3
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    assert find_layers(model).path == "decoder.block"
    assert len(linear_modules(model)) == 3 * (4 + 4 + 2)


# Positions

ENDS = {**TINY, "max_position_embeddings": 16, "pad_token_id": 1}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 31, "n_positions": 16}


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**GPT))


def opt() -> OPTForCausalLM:
    return OPTForCausalLM(OPTConfig(**ENDS, ffn_dim=24, word_embed_proj_dim=16))


@pytest.mark.parametrize(
    ("build", "positions"),
    [
        (gpt2, 16),
        (lambda: get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn", "wpe"])), 16),
        (lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(**GPT)), 16),
        (lambda: GPTJForCausalLM(GPTJConfig(**GPT, rotary_dim=4)), 16),
        (opt, 16),
        (
            lambda: BartForCausalLM(
                BartConfig(
                    **ENDS, d_model=16, decoder_ffn_dim=24, decoder_layers=2, decoder_attention_heads=2
                )
            ),
            16,
        ),
        (lambda: BertForSequenceClassification(BertConfig(**ENDS)), 16),
        (lambda: RobertaForSequenceClassification(RobertaConfig(**ENDS)), 14),
        (lambda: YosoForSequenceClassification(YosoConfig(**ENDS)), 16),
        (lambda: RoFormerForSequenceClassification(RoFormerConfig(**ENDS)), 16),
        (lambda: LlamaForCausalLM(LlamaConfig(**ENDS, num_key_value_heads=1)), None),
        (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**ENDS)), None),
        (lambda: BloomForCausalLM(BloomConfig(vocab_size=31, hidden_size=16, n_layer=2, n_head=2)), None),
    ],
)
def test_a_model_reads_as_many_tokens_as_it_has_positions_and_no_more(build, positions):
    model = build().eval()
    assert positions_of(model) == positions
    tokens = torch.full((1, positions or 40), 5)
    with torch.no_grad():
        model(input_ids=tokens)
        if positions is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, positions + 1), 5))


def test_a_vision_towers_positions_are_not_of_tokens():
    vision = {**TINY, "image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}
    text = LlamaConfig(**ENDS, num_key_value_heads=1)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    assert positions_of(model) is None
