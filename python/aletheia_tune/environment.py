"""What a run runs on: package versions, the allocator's settings, its launch and the memory that this process took."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from aletheia_tune.errors import UserError

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "aletheia-kernels",
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
)

# Of frozen weights.
DTYPES = ("bfloat16", "float32")

# The environment's form of `aletheia_kernels.tune_allocator`, for processes whose settings must not hang on whether
# the extension was built: arms of a benchmark that run plain torch.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def versions() -> dict[str, str]:
    """Versions of Python and of each of `PACKAGES` that is installed, without importing any."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_mb(device: torch.device | None = None) -> float:
    """Largest memory so far, in MiB: resident in this process, or allocated on a CUDA device that is given.

    Linux carries `ru_maxrss` of the launching process over into a program that it starts, so a small child of
    a large parent would report the parent's; the high-water mark of the address space begins afresh and is
    read where it is.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 1024**2
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def machine_facts() -> list[tuple[str, str]]:
    """The machine that this runs on, in words: processor, CPUs, torch's threads, system."""
    import torch

    return [
        ("processor", _processor()),
        ("CPUs, threads", f"{os.cpu_count()} logical CPUs, {torch.get_num_threads()} torch threads"),
        ("system", platform.platform()),
    ]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def native_dtype() -> str:
    """What frozen weights are best kept in here: "bfloat16" where its products run at full rate, else "float32".

    That is with a card, or where a vendor library has them (`aletheia_kernels.dtypes`).
    """
    import torch

    from aletheia_kernels.dtypes import has_vendor_products

    fast = torch.cuda.is_available() or has_vendor_products(torch.bfloat16)
    return "bfloat16" if fast else "float32"


def known_dtype(name: str) -> str:
    """The dtype of frozen weights that a user asked for, "native" resolved.

    Raises:
        UserError: neither of `DTYPES` nor "native".
    """
    if name == "native":
        return native_dtype()
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is unknown: choose one of native, {', '.join(DTYPES)}")
    return name


def is_first_process() -> bool:
    """Whether this is the only process of a run, or the first of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def require_whole_models() -> None:
    """Refuses a launch that would give each process a part of the model.

    Raises:
        UserError: `accelerate launch` was told to use FSDP or DeepSpeed.
    """
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"fine_tune keeps the whole model in every process, and this launch is told to use {name}: "
                "launch it with torchrun, or shard the model in a loop of your own (examples/with_fsdp.py)"
            )
