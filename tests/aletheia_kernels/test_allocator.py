"""The allocator call: freed memory is used again instead of being faulted in anew."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from aletheia_kernels import cpu, tune_allocator

LOOP = """
import resource, sys, torch
from aletheia_kernels import tune_allocator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
tuned = tune_allocator()
faults(), faults()  # an aligned block fits a freed one only once that has neighbours to spare
print(tuned, before, faults())
"""


OF_THE_USER = {"MALLOC_MMAP_MAX_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_TOP_PAD_": "0"}


@pytest.mark.parametrize("of_the_user", [{}, OF_THE_USER], ids=["ours", "of-the-user"])
def test_freed_memory_is_not_faulted_in_again(of_the_user):
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", LOOP], capture_output=True, text=True, check=True, env=plain | of_the_user
    )
    tuned, before, after = done.stdout.split()
    assert tuned == "True"
    if of_the_user:
        assert int(after) > int(before) / 2, "what the environment set must stay"
    else:
        assert int(after) * 10 < int(before)


def test_without_the_extension_it_says_no(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "it was not built")
    assert not tune_allocator()
