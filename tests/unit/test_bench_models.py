"""The table of families: what the command measures, and that the page has it."""

from __future__ import annotations

from pathlib import Path

from tora.bench.families import FAMILIES
from tora.bench.models import table

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_a_row_says_what_holds() -> None:
    lines = table(["qwen3_moe"], with_vllm=False).splitlines()
    assert lines[0] == "| family | layers with adapters | LoRA | DoRA | NF4 | full | packed | torch | vLLM |"
    *cells, packed, engine, vllm = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["Qwen3-MoE", "`q_proj k_proj v_proj o_proj`", "x", "x", "refused", "refused"]
    assert 0 < float(packed) < 1e-4 and 0 < float(engine) < 1e-4 and vllm == "not run"


def test_the_page_has_a_row_for_every_family() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    for family in FAMILIES.values():
        assert len([row for row in rows if row.startswith(f"| {family.title} | `")]) == 1, family.title
