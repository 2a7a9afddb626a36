"""Small random models of the families that people fine-tune: how each is built, and a batch for it.

Facts only: which configuration, which sizes, what a batch consists of. Nothing here is known to the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from torch import Tensor

VOCABULARY = 128
LAYERS = 2
TOKENS = 24
CLASSES = 3
IMAGE_TOKEN = 120
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {**SIZE, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2}

Batch = dict[str, Tensor]


def text(generator: torch.Generator) -> Batch:
    """Two rows, the second padded on the right, the first tokens of each not labelled."""
    ids = torch.randint(3, IMAGE_TOKEN, (2, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, TOKENS - 6 :] = 0
    ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :8] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def classes(generator: torch.Generator) -> Batch:
    batch = text(generator)
    return {**batch, "labels": torch.randint(CLASSES, (2,), generator=generator)}


def translation(generator: torch.Generator) -> Batch:
    batch = text(generator)
    return {**batch, "labels": torch.randint(3, VOCABULARY, (2, 10), generator=generator)}


def llava_picture(generator: torch.Generator) -> Batch:
    """Text with an image of four patches in every row."""
    batch = text(generator)
    batch["input_ids"][:, 1:5] = IMAGE_TOKEN
    return {**batch, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def qwen_picture(generator: torch.Generator) -> Batch:
    """Text with an image of 4 × 4 patches, merged two by two to four tokens, in every row."""
    batch = text(generator)
    batch["input_ids"][:, 1] = IMAGE_TOKEN + 1  # vision start
    batch["input_ids"][:, 2:6] = IMAGE_TOKEN
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).int()
    patches = torch.randn(2 * 16, 3 * 2 * 8 * 8, generator=generator)
    return {**batch, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model: class of the model.
        config: makes its configuration.
        settings: arguments of `config`.
        batch: draws a batch from a generator.
        targets: ends of the names to adapt; all linears and expert parameters by default.
        left_out: why adapters cannot be on all linears.
        factors: by part of a parameter's name, what such parameters are multiplied with.
    """

    model: Any
    config: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    batch: Callable[[torch.Generator], Batch] = text
    targets: tuple[str, ...] | None = None
    left_out: str | None = None
    factors: dict[str, float] = field(default_factory=dict)

    def build(self, seed: int = 0) -> Any:
        """A random model in float32, with weights away from 0 so that no gradient is near rounding."""
        torch.manual_seed(seed)
        model = self.model(self.config(**self.settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
                parameter.mul_(math.prod(by for part, by in self.factors.items() if part in name))
        return model.float()


def encoder(model: Any, config: Callable[..., Any], **settings: Any) -> Family:
    sizes = {**SIZE, "num_labels": CLASSES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return Family(model, config, {**sizes, **settings}, classes)


def _llava(**settings: Any) -> Any:
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )  # fmt: skip
    return tf.LlavaConfig(
        vision_config=vision, text_config=tf.LlamaConfig(**settings), image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip


def _qwen_vl(**settings: Any) -> Any:
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "fullatt_block_indexes": [0],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return tf.Qwen2_5_VLConfig(
        text_config={**settings, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE_TOKEN,
        vision_start_token_id=IMAGE_TOKEN + 1, video_token_id=IMAGE_TOKEN + 2,
    )  # fmt: skip


FAMILIES: dict[str, Family] = {
    "Llama": Family(tf.LlamaForCausalLM, tf.LlamaConfig, GROUPED),
    "Qwen2.5": Family(tf.Qwen2ForCausalLM, tf.Qwen2Config, GROUPED),
    "Qwen3": Family(tf.Qwen3ForCausalLM, tf.Qwen3Config, {**GROUPED, "head_dim": 8}),
    "Mistral": Family(tf.MistralForCausalLM, tf.MistralConfig, {**GROUPED, "sliding_window": 8}),
    "Gemma-2": Family(tf.Gemma2ForCausalLM, tf.Gemma2Config, {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    "Gemma-3": Family(
        tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, {**GROUPED, "head_dim": 8, "sliding_window": 8}
    ),
    "Phi-3": Family(
        tf.Phi3ForCausalLM, tf.Phi3Config, {**GROUPED, "original_max_position_embeddings": 64}
    ),
    "StableLM-2": Family(
        tf.StableLmForCausalLM, tf.StableLmConfig, {**GROUPED, "partial_rotary_factor": 0.25}
    ),
    "GPT-2": Family(
        tf.GPT2LMHeadModel,
        tf.GPT2Config,
        {
            "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "GPT-NeoX": Family(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, SIZE),
    "OPT": Family(
        tf.OPTForCausalLM,
        tf.OPTConfig,
        {
            **{key: value for key, value in SIZE.items() if key != "intermediate_size"}, "ffn_dim": 48,
            "word_embed_proj_dim": 32, "dropout": 0.0,
        },
    ),
    "Falcon": Family(tf.FalconForCausalLM, tf.FalconConfig, {**SIZE, "ffn_hidden_size": 48}),
    "BLOOM": Family(
        tf.BloomForCausalLM,
        tf.BloomConfig,
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4, "pad_token_id": 0},
    ),
    "OLMo-2": Family(tf.Olmo2ForCausalLM, tf.Olmo2Config, GROUPED),
    "Granite": Family(
        tf.GraniteForCausalLM, tf.GraniteConfig, {**GROUPED, "logits_scaling": 4.0, "residual_multiplier": 0.5}
    ),
    "Mixtral": Family(
        tf.MixtralForCausalLM, tf.MixtralConfig, {**GROUPED, **EXPERTS, "num_local_experts": 4}
    ),
    "Qwen3-MoE": Family(
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig,
        {**GROUPED, **EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24, "decoder_sparse_step": 1},
    ),
    "DeepSeek-V3": Family(
        tf.DeepseekV3ForCausalLM,
        tf.DeepseekV3Config,
        {
            **SIZE, **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
            "moe_intermediate_size": 24, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1,
        },
        targets=(
            "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "experts.gate_up_proj",
            "experts.down_proj",
        ),
        left_out="PEFT takes gate_proj, up_proj and down_proj of dense and shared MLPs for experts: no adapters there",
    ),
    "gpt-oss": Family(
        tf.GptOssForCausalLM,
        tf.GptOssConfig,
        {**GROUPED, **EXPERTS, "head_dim": 8, "num_local_experts": 4, "sliding_window": 8},
    ),
    "BERT": encoder(tf.BertForSequenceClassification, tf.BertConfig),
    "RoBERTa": encoder(tf.RobertaForSequenceClassification, tf.RobertaConfig),
    "DeBERTa-v2": encoder(
        tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config, relative_attention=True, pos_att_type=["c2p", "p2c"],
        pooler_hidden_size=32,
    ),
    "ModernBERT": Family(
        tf.ModernBertForSequenceClassification,
        tf.ModernBertConfig,
        {**SIZE, "num_labels": CLASSES, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        classes,
    ),
    "T5": Family(
        tf.T5ForConditionalGeneration,
        tf.T5Config,
        {
            "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4,
            "dropout_rate": 0.0, "decoder_start_token_id": 0, "pad_token_id": 0,
        },
        translation,
        left_out="of an encoder and a decoder the decoder's layers alone are scored and adapted",
    ),
    "LLaVA": Family(tf.LlavaForConditionalGeneration, _llava, GROUPED, llava_picture),
    "Qwen2.5-VL": Family(tf.Qwen2_5_VLForConditionalGeneration, _qwen_vl, GROUPED, qwen_picture),
}  # fmt: skip

# Gradients of the layers up to 2e5, from a head that multiplies them by 5000 and layers that leave the hidden states so
# small that the last norm multiplies them by 30. The loss is finite in every dtype.
BEYOND_FLOAT16 = Family(
    tf.GPTNeoXForCausalLM,
    tf.GPTNeoXConfig,
    {**SIZE, "num_hidden_layers": 4},
    factors={"lm_head": 5000.0, "embed_in": 0.01, "attention.dense": 0.01, "dense_4h_to_h": 0.01},
)
