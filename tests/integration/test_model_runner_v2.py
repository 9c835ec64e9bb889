"""Model Runner V2, which vLLM has on GPUs, held to the tests of the other: see `tests/support/model_runner_v2.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton")

_HERE = Path(__file__).parent
_SUPPORT = _HERE.parent / "support"


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        "test_canary.py",
        "test_vllm_engine.py",
        "test_vllm_episodes.py",
        "test_vllm_groups.py",
        "test_vllm_sampling.py",
        "test_vllm_vision.py",
        "test_vllm_weights.py",
        "test_weight_updates.py",
    ],
)
def test_an_engine_does_the_same(file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "model_runner_v2", "--show-capture=no", _HERE / file],
        env={**os.environ, "PYTHONPATH": f"{_SUPPORT.parents[1]}:{_SUPPORT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
