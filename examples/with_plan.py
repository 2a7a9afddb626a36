"""LoRA under transformers' Trainer, on the half of the layers that a probe chooses.

Of an ordinary script's lines six change: two imports, PEFT's, the configuration, and training inside use_kernels.

python examples/with_plan.py MODEL_DIR train.jsonl adapter
"""

import sys

from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer
from transformers import TrainingArguments as Arguments

from aletheia_tune import make_plan, use_kernels
from aletheia_tune.probe import probe

model_dir, train, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir)

data = load_dataset("json", data_files=train, split="train")
data = data.map(lambda row: tokenizer(row["prompt"] + row["completion"]), remove_columns=data.column_names)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)

config = make_plan(probe(model, [collator([data[i]]) for i in range(8)]), layers=50).to_lora_config(model)
model = get_peft_model(model, config)
arguments = Arguments(out, max_steps=20, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none")
trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)

with use_kernels(model):
    trainer.train()
model.save_pretrained(out)
