"""Builds the C++ operators when torch and a compiler are at hand; the package works without them, on eager torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    print("torch is not importable here: building without the C++ operators", file=sys.stderr)
    build: dict = {}
else:

    class OptionalBuild(BuildExtension):
        """A failed compilation leaves a package that runs on eager torch instead of none at all."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # compilers fail in more ways than one exception type covers
                print(f"building without the C++ operators: {error}", file=sys.stderr)
                self.extensions = []

    # Python's own flags ask for debugging information, which takes a third of the time to compile.
    flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
    if sys.platform == "linux":
        # Without OpenMP at::parallel_for is a plain loop. Compiled for and not linked: the symbols are then those of
        # the runtime that torch brings, whose threads torch.set_num_threads governs.
        flags.append("-fopenmp")
    link_flags: list[str] = []
    if os.environ.get("SANITIZE") == "1":  # `make sanitize`
        link_flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        flags += [*link_flags, "-O1", "-g1", "-fno-omit-frame-pointer"]

    build = {
        "ext_modules": [
            CppExtension(
                "aletheia_kernels._C",
                sorted(str(path) for path in Path("csrc").glob("*.cpp")),
                extra_compile_args=flags,
                extra_link_args=link_flags,
            )
        ],
        "cmdclass": {"build_ext": OptionalBuild},
    }

setup(**build)
