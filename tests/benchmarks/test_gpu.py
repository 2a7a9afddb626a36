"""What the GPU benchmark times are four ways to compute one thing; the clock alone needs a card."""

from __future__ import annotations

import torch

from benchmarks import gpu, tune
from benchmarks.agreement import assert_agree


def test_all_arms_agree():
    torch.manual_seed(0)
    group = gpu.Group(48, 64, (96, 32), (4, 8), torch.device("cpu"))
    arms = group.arms()
    arms["PEFT compiled"] = torch.compile(group.peft, backend="aot_eager")
    expected = group.step(group.peft)
    for arm in arms.values():
        assert_agree(group.step(arm), expected)


def test_without_a_card_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    gpu.main()
    assert "no card" in capsys.readouterr().out


def test_tuning_says_so_too(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tune.main()
    assert "no card" in capsys.readouterr().out
