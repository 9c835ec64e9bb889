"""`tora doctor --parity` on a tiny model, with real engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import make_text_model, make_vl_model

from tora.cli import main


@pytest.mark.parametrize(
    ("make", "num_prompts"),
    [pytest.param(make_text_model, 4, id="text", marks=pytest.mark.slow), pytest.param(make_vl_model, 3, id="vision")],
)
def test_every_method_in_both_dtypes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path], num_prompts: int
) -> None:
    pytest.importorskip("vllm")
    assert main(["doctor", "--parity", str(make(tmp_path)), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    methods = ["lora", "dora", "qlora", "qdora"]
    assert [(row["dtype"], row["method"]) for row in rows] == [(d, m) for d in ("fp32", "bf16") for m in methods]
    for row in rows:
        exact = row["dtype"] == "fp32"
        assert all((row[f"{what}_max"] < 1e-4) == exact for what in ("sampled", "on", "off"))
        assert (row["rounding"] == 0) == exact
        assert row["effect"] > 0.01 and row["tokens"] == num_prompts * 4 * 32 and row["holds"]


def test_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--parity", str(tmp_path)]) == 2
    assert "not a Hugging Face model folder" in capsys.readouterr().err
