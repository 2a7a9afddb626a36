"""compute-sanitizer finds nothing in any kernel: no access out of bounds, no race in shared memory, no lost barrier."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

FOUND = 86


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH (it comes with the CUDA toolkit)")
    # Allocated one by one, tensors have bounds that memcheck knows.
    environment = os.environ | {"ALETHEIA_BACKEND": "triton", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND)]
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.triton.gpu.every_call"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
