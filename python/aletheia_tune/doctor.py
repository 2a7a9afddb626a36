"""What `aletheia doctor` finds: versions, processor features, each operator's backend and self-test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from aletheia_kernels import backends, cpu, selftest
from aletheia_tune.environment import native_dtype, versions


@dataclass(frozen=True)
class Operator:
    """One operator on one device: which backend serves it and why, and how its self-test went."""

    operator: str
    backend: str
    reason: str
    ok: bool
    error: float
    allowed: float
    seconds: float


@dataclass(frozen=True)
class Device:
    """The operators on one device, or why none can run there."""

    device: str
    name: str
    operators: tuple[Operator, ...]
    failure: str | None


@dataclass(frozen=True)
class Examination:
    """The state of this installation on this machine."""

    versions: dict[str, str]
    processor: dict[str, str]
    devices: tuple[Device, ...]

    @property
    def healthy(self) -> bool:
        """Whether every operator can run and passed its self-test, on every device."""
        return all(
            device.failure is None and all(operator.ok for operator in device.operators)
            for device in self.devices
        )

    def show(self, console: Console) -> None:
        """Print it as tables."""
        console.print(_pairs("installed", self.versions))
        console.print(_pairs("processor", self.processor))
        for device in self.devices:
            _show(device, console)


def examine() -> Examination:
    """Look at what is installed and run every operator's self-test, also on devices after one that fails."""
    processor = {name: "yes" if there else "no" for name, there in cpu.features().items()}
    if cpu.unavailable_reason() is None and cpu.wrong_wish() is None:
        processor["instruction set in use"] = cpu.instruction_set()
    processor["native dtype"] = native_dtype()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return Examination(versions(), processor, tuple(map(_examine, devices)))


def _examine(device: str) -> Device:
    name = "" if device == "cpu" else torch.cuda.get_device_name(device)
    try:
        choices = backends.explain(device)
        results = {result.operator: result for result in selftest.run(device)}
    except backends.BackendError as error:
        return Device(device, name, (), str(error))
    operators = tuple(
        Operator(
            operator,
            choices[operator].backend,
            choices[operator].reason,
            result.ok,
            result.error,
            result.allowed,
            result.seconds,
        )
        for operator, result in results.items()
    )
    return Device(device, name, operators, None)


def _show(device: Device, console: Console) -> None:
    if device.failure is not None:
        console.print(f"[red]no operator can run on {device.device}:[/red] {device.failure}", highlight=False)
        return
    table = Table(title=f"operators on {device.name}" if device.name else "operators", title_justify="left")
    for head in ("operator", "backend", "self-test", "error (allowed)", "seconds"):
        table.add_column(head, no_wrap=True)
    for one in device.operators:
        verdict = "[green]ok[/green]" if one.ok else "[red]wrong[/red]"
        errors = f"{one.error:.1e} ({one.allowed:.0e})"
        table.add_row(one.operator, one.backend, verdict, errors, f"{one.seconds:.2f}")
    console.print(table)
    # Reasons are sentences, and mostly one: under the table, each once.
    for backend, reason in dict.fromkeys((one.backend, one.reason) for one in device.operators):
        served = ", ".join(
            one.operator for one in device.operators if (one.backend, one.reason) == (backend, reason)
        )
        console.print(f"{backend}: {reason} ({served})", highlight=False)


def _pairs(title: str, values: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        table.add_row(name, value)
    return table
