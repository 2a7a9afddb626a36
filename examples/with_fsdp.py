"""LoRA in a loop under FSDP2: of several processes each holds a part of the frozen model, a single one has it whole.

torchrun --standalone --nproc-per-node 2 examples/with_fsdp.py MODEL_DIR train.jsonl OUT STEPS [CHECKPOINT]
"""

import os
import sys

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from aletheia_tune import (
    cut_prefix,
    load_examples,
    load_optimizer,
    make_plan,
    plan_of_first,
    save_checkpoint,
    scores_of_all,
    use_kernels,
)
from aletheia_tune.data import batches, pad_token_id
from aletheia_tune.layers import find_layers
from aletheia_tune.probe import probe

model_dir, train, out, steps, *resumed = sys.argv[1:]
several = dist.is_torchelastic_launched()
if several:
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

torch.manual_seed(0)  # every process draws the same adapters
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir).to(torch.accelerator.current_accelerator() or "cpu")
examples, pad = load_examples(train, tokenizer), pad_token_id(tokenizer)
if resumed:
    model = PeftModel.from_pretrained(model, resumed[0], is_trainable=True)
else:
    mine = batches(examples, 2, pad, seed=0, count=4)[rank::world]
    plan = plan_of_first(make_plan(scores_of_all(probe(model, mine)), layers=50))
    model = get_peft_model(model, plan.to_lora_config(model))
cut_prefix(model)

with use_kernels(model):  # which looks at the model's parts, so before they are sharded
    if several:
        for layer in find_layers(model).layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if resumed:
        load_optimizer(model, optimizer, resumed[0])
    done = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    model.train()
    for step, batch in enumerate(batches(examples, 8, pad, seed=0, count=int(steps))[done:], start=done + 1):
        part = {name: rows[rank::world].to(model.device) for name, rows in batch.items()}
        # Gradients are averaged over the processes: so each labelled token of the step weighs the same.
        labelled = int((batch["labels"][:, 1:] != -100).sum())
        loss = model(**part, num_items_in_batch=labelled / world).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.detach() / world
        if several:
            dist.all_reduce(shown)
        if rank == 0:
            print(step, shown.item())
    save_checkpoint(model, optimizer, out)
if several:
    dist.destroy_process_group()
