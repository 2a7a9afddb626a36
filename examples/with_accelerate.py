"""LoRA in a loop on Accelerate. The line with use_kernels is this package's; without it the script is anybody's.

python examples/with_accelerate.py MODEL_DIR train.jsonl adapter
"""

import sys

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from aletheia_tune import use_kernels

model_dir, train, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir)
config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config)

data = load_dataset("json", data_files=train, split="train")
data = data.map(lambda row: tokenizer(row["prompt"] + row["completion"]), remove_columns=data.column_names)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=collator)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
accelerator = Accelerator()
model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)

with use_kernels(accelerator.unwrap_model(model)):
    for batch, _ in zip(loader, range(20), strict=False):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
accelerator.unwrap_model(model).save_pretrained(out)
