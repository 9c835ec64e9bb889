"""Runs the programs of this folder that have Triton interpret its kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_SUPPORT = Path(__file__).parent
_ROOT = _SUPPORT.parents[1]


def printed_by(program: str) -> dict[str, Any]:
    """The JSON object that a program prints last, in a process of its own: Triton reads its settings at import."""
    done = subprocess.run(
        [sys.executable, _SUPPORT / program],
        env={**os.environ, "PYTHONPATH": f"{_ROOT}:{_SUPPORT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
