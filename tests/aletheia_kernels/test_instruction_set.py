"""The compiled LoRA group equals its definition on every instruction set that this processor offers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aletheia_kernels import backends, cpu, lora_group, range_attention
from tests.aletheia_kernels.test_lora import Case
