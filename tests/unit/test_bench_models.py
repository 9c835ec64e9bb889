"""The table of families: what the command measures, and that the page has it."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from tora.bench.families import FAMILIES
from tora.bench.models import Row, merged, rows, table, write
from tora.bench.vision_families import VISION_FAMILIES

COLUMNS = ("LoRA", "DoRA", "NF4", "full", "vLLM")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_a_row_says_what_holds() -> None:
    (found,) = rows(["qwen3_moe"], with_vllm=False)
    lines = table([found.cells]).splitlines()
    assert lines[0] == "| family | takes | layers with adapters | LoRA | DoRA | NF4 | full | packed | torch | vLLM |"
    *cells, packed, engine, vllm = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["Qwen3-MoE", "text", "`q_proj k_proj v_proj o_proj`", "x", "x", "refused", "refused"]
    assert 0 < float(packed) < 1e-4 and 0 < float(engine) < 1e-4 and vllm == "not run"
    assert found.reasons.keys() == {"NF4", "full"}
    assert all("does not reach the experts of Qwen3MoeForCausalLM" in reason for reason in found.reasons.values())


def test_a_model_of_a_row_has_what_vllm_loads(tmp_path: Path) -> None:
    """Its tokenizer too, with the end token that its config names."""
    tokenizer = AutoTokenizer.from_pretrained(write(tmp_path, "mistral"))
    assert tokenizer.eos_token_id == AutoConfig.from_pretrained(tmp_path).eos_token_id == 2
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


def test_the_page_has_a_row_for_every_family() -> None:
    found = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    for title in [family.title for family in (*FAMILIES.values(), *VISION_FAMILIES.values())]:
        assert len([line for line in found if line.startswith(f"| {title} | text")]) == 1, title


def test_a_row_takes_the_place_of_its_familys_and_keeps_what_was_not_run() -> None:
    page = PAGE.read_text()
    head, *_ = table([]).splitlines()
    cells = ["Mistral", "text", "`q_proj`", *["x"] * 4, "1e-09", "2e-09"]
    once = merged(page, [Row([*cells, "3e-09"])])
    assert once.count("| Mistral | text |") == 1 and once.count(head) == 1 and "| 1e-09 | 2e-09 | 3e-09 |" in once
    assert merged(once, [Row([*cells, "not run"])]) == once
    assert len(once.splitlines()) == len(page.splitlines())


def test_the_page_says_why_something_is_refused() -> None:
    """By the program's own words, which stay or go with what was run."""
    page, cells = PAGE.read_text(), ["Mistral", "text", "`q_proj`", *["x"] * 4, "1e-09", "2e-09"]
    reasons = {"NF4": "model.quantize_base=true, not here: why", "vLLM": "a CPU cannot"}
    notes = ["- Mistral, NF4: model.quantize_base=true, not here: why.", "- Mistral, vLLM: a CPU cannot."]
    refused = merged(page, [Row([*cells, "refused"], reasons)])
    assert [line for line in refused.splitlines() if line.startswith("- Mistral")] == notes
    assert merged(refused, [Row([*cells, "refused"], reasons)]) == refused
    without_vllm = merged(refused, [Row([*cells, "not run"])])
    assert [line for line in without_vllm.splitlines() if line.startswith("- Mistral")] == notes[1:]
    assert merged(refused, [Row([*cells, "3e-09"])]) == merged(page, [Row([*cells, "3e-09"])])
    for title in [family.title for family in (*FAMILIES.values(), *VISION_FAMILIES.values())]:
        (rest,) = (line.split("|") for line in page.splitlines() if line.startswith(f"| {title} | text"))
        said = [x for x in page.splitlines() if x.startswith(tuple(f"- {title}, {c}:" for c in COLUMNS))]
        assert len(said) == rest.count(" refused "), title
