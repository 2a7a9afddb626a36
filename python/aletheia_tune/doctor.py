"""What `aletheia doctor` prints: versions, processor features, each operator's backend and self-test."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from aletheia_kernels import backends, cpu, selftest
from aletheia_tune.environment import native_dtype, versions


def examine(console: Console) -> bool:
    """Print the state of this installation on this machine; whether every operator passed its self-test."""
    console.print(_pairs("installed", versions()))
    processor = {name: "yes" if there else "no" for name, there in cpu.features().items()}
    if cpu.unavailable_reason() is None and cpu.wrong_wish() is None:
        processor["instruction set in use"] = cpu.instruction_set()
    processor["native dtype"] = native_dtype()
    console.print(_pairs("processor", processor))
    # Every device is examined, also after one whose operators fail.
    passed = [_examine_operators(console, device) for device in _devices()]
    return all(passed)


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _examine_operators(console: Console, device: str) -> bool:
    try:
        choices = backends.explain(device)
        results = {result.operator: result for result in selftest.run(device)}
    except backends.BackendError as error:
        console.print(f"[red]no operator can run on {device}:[/red] {error}", highlight=False)
        return False
    where = "" if device == "cpu" else f" on {torch.cuda.get_device_name(device)}"
    table = Table(title=f"operators{where}", title_justify="left")
    for head in ("operator", "backend", "self-test", "error (allowed)", "seconds"):
        table.add_column(head, no_wrap=True)
    for operator, result in results.items():
        verdict = "[green]ok[/green]" if result.ok else "[red]wrong[/red]"
        errors = f"{result.error:.1e} ({result.allowed:.0e})"
        table.add_row(operator, choices[operator].backend, verdict, errors, f"{result.seconds:.2f}")
    console.print(table)
    # Reasons are sentences, and mostly one: under the table, each once.
    for choice in dict.fromkeys(choices.values()):
        served = ", ".join(operator for operator, other in choices.items() if other == choice)
        console.print(f"{choice.backend}: {choice.reason} ({served})", highlight=False)
    return all(result.ok for result in results.values())


def _pairs(title: str, values: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        table.add_row(name, value)
    return table
