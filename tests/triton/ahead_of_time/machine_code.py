"""What the machine code of a compiled kernel holds: counted in the disassembly, since there is no driver to ask."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

from triton import knobs
from triton.compiler import CompiledKernel


@dataclass(frozen=True)
class Figures:
    """What one kernel takes of a card.

    Attributes:
        registers: a thread.
        spills: instructions that move a thread's own values to memory or back.
        shared_memory: bytes a program.
        tensor_core: matrix instructions in the code, by name (``HGMMA 4``); empty when there are none.
        asynchronous_copies: instructions that copy from global to shared memory past the registers.
        wide_accesses: instructions that move 16 bytes a thread, or a whole tile, from or to global memory.
    """

    registers: int
    spills: int
    shared_memory: int
    tensor_core: str
    asynchronous_copies: int
    wide_accesses: int


_MATRIX = re.compile(r"(?:[A-Z]*MMA|UTC[A-Z]+MMA)$|v_(?:s?mfma|s?wmma)")
_NVIDIA = {
    "spills": re.compile(r"(?:LDL|STL)\b"),
    "asynchronous_copies": re.compile(r"(?:LDGSTS|UTMALDG|UBLKCP)\b"),
    "wide_accesses": re.compile(r"(?:LDG|STG|LDGSTS)\b.*\.128\b|(?:UTMALDG|UTMASTG|UBLKCP)\b"),
}
_AMD = {
    "spills": re.compile(r"scratch_(?:load|store)"),
    "asynchronous_copies": re.compile(
        r"(?:global|buffer)_load_(?:lds_|async_).*|(?:global|buffer)_load.*\blds$"
    ),
    "wide_accesses": re.compile(r"(?:global|buffer)_(?:load|store)_(?:lds_|async_\w*)?(?:dwordx4|b128)\b"),
}


def figures(kernel: CompiledKernel) -> Figures:
    """The figures of a kernel that ``triton.compile`` made for any NVIDIA or AMD card."""
    if "cubin" in kernel.asm:
        registers, instructions = _of_cubin(kernel.asm["cubin"])
        patterns = _NVIDIA
    else:
        code = kernel.asm["amdgcn"]
        registers = int(_only(r"\.vgpr_count:\s+(\d+)", code)) + int(
            _only(r"\.agpr_count:\s+(\d+)", code, "0")
        )
        instructions = re.findall(r"^\t([a-z]\w+[^;\n]*?)\s*(?:;.*)?$", code, re.MULTILINE)
        patterns = _AMD
    matrix = Counter(match for match in map(_matrix_instruction, instructions) if match)
    counts = {
        name: sum(1 for instruction in instructions if pattern.match(instruction))
        for name, pattern in patterns.items()
    }
    return Figures(
        registers=registers,
        shared_memory=kernel.metadata.shared,
        tensor_core=", ".join(f"{name} {count}" for name, count in sorted(matrix.items())),
        **counts,
    )


def _matrix_instruction(instruction: str) -> str | None:
    """``HGMMA`` of ``HGMMA.64x64x16.F32.BF16 R24, …``, an AMD name as it is; None for other instructions."""
    name = instruction.split()[0].split(".")[0]
    return name if _MATRIX.match(name) else None


def _of_cubin(cubin: bytes) -> tuple[int, list[str]]:
    """Registers a thread, and the instructions, without their predicates."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = int(_only(r"\bREG:(\d+)", listing))
    return registers, re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][^;]*)", listing, re.MULTILINE)


def _only(pattern: str, text: str, otherwise: str | None = None) -> str:
    found = set(re.findall(pattern, text))
    if not found and otherwise is not None:
        return otherwise
    (value,) = found
    return value
