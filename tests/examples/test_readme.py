"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from peft import PeftConfig
from typer.testing import CliRunner

from aletheia_tune.cli import app

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_saves_an_adapter(users_directory, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert PeftConfig.from_pretrained("adapter").r == 16
    assert "modules run on the kernels" in capsys.readouterr().out


def test_the_commands_work_in_sequence(users_directory):
    (block,) = [
        block
        for block in re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)
        if block.startswith("aletheia ")
    ]
    commands = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert [command[0] for command in commands] == ["plan", "train", "doctor", "probe", "plan"]
    for command in (command for command in commands if command[0] != "doctor"):
        finished = CliRunner().invoke(app, command)
        assert finished.exit_code == 0, finished.output
    assert (users_directory / "runs" / "mine" / "adapter_model.safetensors").is_file()


def test_its_links_lead_somewhere():
    headings = {
        "#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)
    }
    targets = re.findall(r"\]\(([^)]*)\)", README)
    assert targets
    assert {target for target in targets if target.startswith("#")} <= headings
    root = Path(__file__).resolve().parents[2]
    assert all((root / target).exists() for target in targets if not target.startswith(("#", "http")))
