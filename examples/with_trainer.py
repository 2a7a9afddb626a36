"""LoRA under transformers' Trainer. The line with use_kernels is this package's; without it the script is anybody's.

python examples/with_trainer.py MODEL_DIR train.jsonl adapter
"""

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer
from transformers import TrainingArguments as Arguments

from aletheia_tune import use_kernels

model_dir, train, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir)

data = load_dataset("json", data_files=train, split="train")
data = data.map(lambda row: tokenizer(row["prompt"] + row["completion"]), remove_columns=data.column_names)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)

config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config)
arguments = Arguments(out, max_steps=20, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none")
trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)

with use_kernels(model):
    trainer.train()
model.save_pretrained(out)
