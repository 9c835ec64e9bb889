"""The table of families: what the command measures, and that the page has it."""

from __future__ import annotations

from pathlib import Path

from tora.bench.families import FAMILIES
from tora.bench.models import merged, rows, table
from tora.bench.vision_families import VISION_FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_a_row_says_what_holds() -> None:
    lines = table([*rows(["qwen3_moe"], with_vllm=False)]).splitlines()
    assert lines[0] == "| family | takes | layers with adapters | LoRA | DoRA | NF4 | full | packed | torch | vLLM |"
    *cells, packed, engine, vllm = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["Qwen3-MoE", "text", "`q_proj k_proj v_proj o_proj`", "x", "x", "refused", "refused"]
    assert 0 < float(packed) < 1e-4 and 0 < float(engine) < 1e-4 and vllm == "not run"


def test_the_page_has_a_row_for_every_family() -> None:
    found = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    for title in [family.title for family in (*FAMILIES.values(), *VISION_FAMILIES.values())]:
        assert len([line for line in found if line.startswith(f"| {title} | text")]) == 1, title


def test_a_row_takes_the_place_of_its_familys_and_keeps_what_was_not_run() -> None:
    page = PAGE.read_text()
    head, *_ = table([]).splitlines()
    cells = ["Mistral", "text", "`q_proj`", *["x"] * 4, "1e-09", "2e-09"]
    once = merged(page, [[*cells, "3e-09"]])
    assert once.count("| Mistral | text |") == 1 and once.count(head) == 1 and "| 1e-09 | 2e-09 | 3e-09 |" in once
    assert merged(once, [[*cells, "not run"]]) == once
    assert len(once.splitlines()) == len(page.splitlines())
