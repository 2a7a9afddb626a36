"""LoRA under TRL's DPOTrainer. The line with use_kernels is this package's; without it the script is anybody's.

python examples/with_dpo.py MODEL_DIR preferences.jsonl adapter
"""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from aletheia_tune import use_kernels

model_dir, train, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir)
config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")

data = load_dataset("json", data_files=train, split="train")  # prompt, chosen, rejected
arguments = DPOConfig(
    out,
    max_steps=20,
    per_device_train_batch_size=4,
    learning_rate=1e-3,
    bf16=model.dtype == torch.bfloat16,
    logging_steps=1,
    report_to="none",
)
trainer = DPOTrainer(
    model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=config
)

with use_kernels(trainer.model):  # the reference is the model without its adapters, on its own forwards
    trainer.train()
trainer.save_model(out)
