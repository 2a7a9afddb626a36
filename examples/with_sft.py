"""LoRA under TRL's SFTTrainer. The line with use_kernels is this package's; without it the script is anybody's.

python examples/with_sft.py MODEL_DIR train.jsonl adapter
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from aletheia_tune import use_kernels

model_dir, train, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir)
config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config)

data = load_dataset("json", data_files=train, split="train")
arguments = SFTConfig(
    out, max_steps=20, learning_rate=1e-3, bf16=model.dtype == torch.bfloat16, report_to="none"
)
trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)

with use_kernels(model):
    trainer.train()
model.save_pretrained(out)
