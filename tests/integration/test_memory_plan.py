"""The plan against measured peaks, of a model whose activations outweigh its weights. Minutes."""

from __future__ import annotations

from typing import Literal

import pytest

from tora.bench.learner import Workload
from tora.bench.memory_plan import SETTINGS, in_a_process

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_plan_is_within_a_tenth_of_the_peak(name: str, dtype: Literal["fp32", "bf16"]) -> None:
    planned, measured = in_a_process("small", name, dtype, Workload(tokens=1024, sequence=256))
    assert planned == pytest.approx(measured, rel=0.1)
