"""Which backend serves, said in words; a package without its extension still works and says so once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aletheia_kernels
from aletheia_kernels import backends, cpu, selftest


def test_cpu_serves_cpu_tensors():
    choices = backends.explain("cpu", torch.bfloat16)
    assert set(choices) == set(backends.OPERATORS)
    assert {choice.backend for choice in choices.values()} == {"cpu"}


def test_the_reference_serves_what_no_compiled_backend_does():
    choice = backends.choose("lora_group", "cpu", torch.float8_e4m3fn)
    assert choice.backend == "reference"
    assert "cpu: it has no torch.float8_e4m3fn" in choice.reason


def test_forcing_a_backend(monkeypatch):
    monkeypatch.setenv("ALETHEIA_BACKEND", "reference")
    assert backends.choose("lora_group", "cpu", torch.float32) == backends.Choice(
        "reference", "forced by ALETHEIA_BACKEND"
    )
    monkeypatch.setenv("ALETHEIA_BACKEND", "cpu")
    with pytest.raises(backends.BackendError, match="it serves CPU tensors, not cuda"):
        backends.choose("lora_group", "cuda", torch.float32)


def test_self_test_passes_and_leaves_the_random_state():
    before = torch.get_rng_state()
    results = selftest.run()
    assert torch.equal(torch.get_rng_state(), before)
    assert [result.operator for result in results] == list(backends.OPERATORS)
    assert all(result.ok for result in results), results


def test_self_test_notices_a_wrong_operator(monkeypatch):
    right = cpu.operators()

    class WithoutScaling:
        def __getattr__(self, name):
            return getattr(right, name)

        def lora_group_forward(self, x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seed):
            ones = [1.0] * len(scalings)
            return right.lora_group_forward(x, weights, biases, lora_As, lora_Bs, ones, dropout_p, seed)

    monkeypatch.setattr(cpu, "operators", WithoutScaling)
    assert [result.operator for result in selftest.run() if not result.ok] == ["lora_group"]


def test_self_test_notices_nan(monkeypatch):
    right = cpu.operators()

    class Nan:
        def __getattr__(self, name):
            return getattr(right, name)

        def bias_grad_norm_sq(self, dy):
            value = right.bias_grad_norm_sq(dy)
            return value * float("nan") if dy.dtype == torch.float32 else value

    monkeypatch.setattr(cpu, "operators", Nan)
    assert [result.operator for result in selftest.run() if not result.ok] == ["bias_grad_norm_sq"]


def test_self_test_seeds_no_other_device(monkeypatch):
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    selftest.check("rms_norm", torch.device("cpu"), torch.float32)
    assert seeded == []


def test_without_the_extension_it_runs_on_eager_torch_and_says_so_once(tmp_path):
    package = Path(aletheia_kernels.__file__).parent
    shutil.copytree(
        package, tmp_path / "aletheia_kernels", ignore=shutil.ignore_patterns("_C*", "__pycache__")
    )
    program = """
import torch, aletheia_kernels as ak
print(ak.__file__)
x = torch.ones(4, 3)
for _ in range(2):
    (y,) = ak.lora_group(x, [torch.eye(3)], [None], [torch.ones(1, 3)], [torch.ones(3, 1)], [1.0])
assert torch.equal(y, torch.full((4, 3), 4.0))
print(ak.backends.choose("lora_group", "cpu", torch.float32).backend)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )
    assert done.stdout.split() == [str(tmp_path / "aletheia_kernels" / "__init__.py"), "reference"]
    assert done.stderr.count("aletheia_kernels runs on eager torch") == 1
