"""The sampler of vLLM's runner for GPUs, by Triton's interpreter: see `tests/support/interpreted_sampler.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_policy_is_reported_beside_what_is_drawn() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tests/support/interpreted_sampler.py"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("adapters") == [2, 2, 0, 1, 1, 1], "each token has its request's adapter"
    assert len(found) == 9
    for kind, measured in found.items():
        assert measured["error"] < 2e-6, kind
        # a frequency's mean error is 1; the deviation over 192 draws is about a tenth of it
        assert measured["variation"] < 1.6, kind
