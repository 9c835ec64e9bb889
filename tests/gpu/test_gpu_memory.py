"""The memory plan against a GPU's own count."""

from __future__ import annotations

import pytest

from tora.bench.learner import Workload
from tora.bench.memory_plan import in_a_process


@pytest.mark.parametrize("name", ["lora", "dora_cache", "qlora", "full", "lora, checkpointed"])
def test_the_plan_is_within_a_tenth_of_the_peak(name: str) -> None:
    planned, measured = in_a_process("small", name, "bf16", Workload(tokens=8192, sequence=1024))
    assert planned == pytest.approx(measured, rel=0.1)
