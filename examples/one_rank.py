"""A LoRA adapter of unequal ranks as one of a single rank and alpha, for what reads no rank_pattern and alpha_pattern.

vLLM scales every module by lora_alpha / r, llama.cpp by lora_alpha / the module's own rank. Where all ranks are r, both
are PEFT's: so every A gets rows of zeros up to the largest rank, and B what is special about its module's scaling.

python examples/one_rank.py adapter out
"""

import math
import sys
from collections import Counter
from pathlib import Path

from peft import PeftConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad

adapter, out = map(Path, sys.argv[1:])
config = PeftConfig.from_pretrained(str(adapter))
weights = load_file(adapter / "adapter_model.safetensors")
if config.target_parameters:
    sys.exit(f"{adapter} has adapters on stacked experts, which are laid out otherwise: `aletheia merge` it")

scalings = {}
for module in [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]:
    rank = len(weights[f"{module}.lora_A.weight"])
    key = get_pattern_key(config.alpha_pattern, module.removeprefix("base_model.model."))
    alpha = config.alpha_pattern.get(key, config.lora_alpha)
    scalings[module] = alpha / (math.sqrt(rank) if config.use_rslora else rank)

largest = max(len(weights[f"{module}.lora_A.weight"]) for module in scalings)
commonest = Counter(scalings.values()).most_common(1)[0][0]
for module, scaling in scalings.items():
    a, b = (f"{module}.lora_{side}.weight" for side in "AB")
    missing = largest - len(weights[a])
    weights[a] = pad(weights[a], (0, 0, 0, missing))
    weights[b] = pad(weights[b] * (scaling / commonest), (0, missing))

config.r, config.lora_alpha, config.use_rslora = largest, commonest * largest, False
config.rank_pattern, config.alpha_pattern = {}, {}
out.mkdir(parents=True)
save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
config.save_pretrained(str(out))
print(f"{len(scalings)} modules, all of rank {largest}")
