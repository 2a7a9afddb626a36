"""LoRA under TRL's GRPOTrainer, rewarded for sums. The line with use_kernels is this package's.

python examples/with_grpo.py MODEL_DIR adapter
"""

import random
import re
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from aletheia_tune import use_kernels


def closeness(completions: list[str], answer: list[int], **_: object) -> list[float]:
    """1 for the right number at the beginning, less the further off it is, 0 for none."""
    given = [re.match(r"\s*(\d+)", completion) for completion in completions]
    return [1 / (1 + abs(int(g[1]) - right)) if g else 0.0 for g, right in zip(given, answer, strict=True)]


model_dir, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(model_dir)
config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

draw = random.Random(0)
sums = [(draw.randrange(10), draw.randrange(10)) for _ in range(200)]
data = Dataset.from_list([{"prompt": f"{a} + {b} =", "answer": a + b} for a, b in sums])
arguments = GRPOConfig(
    out,
    max_steps=10,
    per_device_train_batch_size=16,
    num_generations=8,
    max_completion_length=4,
    learning_rate=1e-3,
    bf16=model.dtype == torch.bfloat16,
    logging_steps=1,
    report_to="none",
)
trainer = GRPOTrainer(model, closeness, arguments, data, processing_class=tokenizer, peft_config=config)

with use_kernels(trainer.model):
    trainer.train()
trainer.save_model(out)
