"""What the GPU benchmark times are ways to compute one thing, which take turns; the clock alone needs a card."""

from __future__ import annotations

import torch

from benchmarks import gpu, tune
from benchmarks.agreement import assert_agree


def test_all_arms_agree():
    torch.manual_seed(0)
    steps = gpu.Group(48, 64, (96, 32), (4, 8), torch.device("cpu")).steps(compiler="aot_eager")
    expected = steps["PEFT fp32"]()
    for step in steps.values():
        assert_agree(step(), expected)


def test_every_form_of_peft_takes_part_in_its_own_precision():
    group = gpu.Group(48, 64, (96, 32), (4, 8), torch.device("cpu"))
    steps = group.steps(compiler="aot_eager")
    dtypes = {name: {t.dtype for t in step()[3:]} for name, step in steps.items()}
    for name, found in dtypes.items():
        assert found == {torch.bfloat16 if "bf16" in name else torch.float32}, name


def test_arms_take_turns():
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in ("one", "other")}

    def once(step):
        step()
        return [1.0]

    times = gpu.time_in_turns(steps, once)
    assert order == ["one", "other"] * gpu.TURNS
    assert {name: len(found) for name, found in times.items()} == {"one": gpu.TURNS, "other": gpu.TURNS}


def test_without_a_card_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    gpu.main()
    assert "no card" in capsys.readouterr().out


def test_tuning_says_so_too(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tune.main()
    assert "no card" in capsys.readouterr().out
