"""The memory plans that the documentation quotes are those of `tora plan`."""

from __future__ import annotations

import re

import pytest
from pages import ROOT, blocks

from tora.cli import main

PAGE = (ROOT / "docs/one-gpu.md").read_text()
ROWS = re.findall(r"^\| (\d+) GB.*? \| `tora run ([^`]+)` \| ([\d.]+) GiB \|$", PAGE, re.MULTILINE)


def test_the_page_has_cards_of_several_sizes() -> None:
    assert len({size for size, _, _ in ROWS}) == 4


@pytest.mark.parametrize(("size", "words", "left"), ROWS)
def test_a_cards_row_is_what_the_plan_says(
    capsys: pytest.CaptureFixture[str], size: str, words: str, left: str
) -> None:
    config, *overrides = words.split()
    assert main(["plan", config, "--gpu-gib", size, *overrides]) == 0
    assert re.search(rf"^left +{re.escape(left)}$", capsys.readouterr().out, re.MULTILINE)


def test_the_quoted_lines_are_the_plans(capsys: pytest.CaptureFixture[str]) -> None:
    command = re.search(r"^tora (plan .*)$", PAGE, re.MULTILINE)
    assert command is not None and main(command[1].split()) == 0
    said = capsys.readouterr().out.splitlines()
    (quoted,) = [block.text.splitlines() for block in blocks(ROOT / "docs/one-gpu.md", "") if "total" in block.text]
    assert set(quoted) <= set(said) and len(quoted) > 5
    main(["plan", "qwen3/8B_lora_grpo_single_device", "--gpu-gib", "80", "max_generated_tokens=4096"])
    assert "holds 57 rollouts" in capsys.readouterr().out and "hold" in PAGE and "57 of them instead of 257" in PAGE
