"""The reference of config keys: complete, current, and the same on the page as in the schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tora.config import reference
from tora.config.reference import Entry, entries, nearest_key, sections

ENTRIES = {entry.key: entry for entry in entries()}
PAGE = Path(__file__).parents[2] / "docs" / "config.md"


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_every_key_is_documented(entry: Entry) -> None:
    assert len(entry.doc) >= 20 and entry.doc.endswith("."), entry.key
    assert "\n" not in entry.facts() and entry.facts()
    if entry.is_optional:
        assert "null:" in entry.doc, f"{entry.key} does not say what null means"


def test_an_entry_has_type_bounds_and_default() -> None:
    facts = {key: entry.facts() for key, entry in ENTRIES.items()}
    assert facts["model.lora_rank"] == "a whole number, at least 1; default 8"
    assert facts["model.path"] == "text; required"
    assert facts["model.lora_type"] == "one of full, lora, dora, dora_cache; default lora"
    assert facts["rollout.max_workers"] == "a whole number, at least 1, or null; default null"
    assert facts["rollout.dtype"] == "one of bf16, fp32, or null; default null"
    assert facts["top_p"] == "a finite number, greater than 0, at most 1; default 1.0"
    assert facts["rewards"] == "a list of components; required"
    assert facts["loss"] == 'a component; default {"_component_": "learner.loss.GRPOLoss"}'
    assert facts["eval"] == "a section, or null; default null"
    assert (facts["model"], facts["sync"]) == ("a section; required", "a section")
    assert ENTRIES["model.lora_rank"].facts("`").endswith("default `8`")
    assert ENTRIES["model.use_rslora"].doc.startswith("Rank-stabilized LoRA: scale by")
    assert ENTRIES["optimizer"].is_component and ENTRIES["rewards"].is_component and not ENTRIES["name"].is_component


def test_sections_hold_every_key_once() -> None:
    by_section = sections()
    assert list(by_section) == ["", "model", "rollout", "sync", "eval", "checkpoint"]
    keys = [entry.key for members in by_section.values() for entry in members]
    assert len(keys) == len(set(keys)) and {*keys, *by_section} == {"", *ENTRIES}
    assert [entry.key for entry in by_section["checkpoint"]] == ["checkpoint.every", "checkpoint.keep"]


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("model.lora_rnk", "model.lora_rank"),
        ("lora_rank", "model.lora_rank"),
        ("rollouts", "rollout"),
        ("temprature", "temperature"),
        ("modle.lora_rank", "model.lora_rank"),
        ("rollout.batch_size", "batch_size"),
    ],
)
def test_nearest_key(word: str, key: str) -> None:
    assert nearest_key(word) == key


def test_the_page_is_current_and_made_without_torch() -> None:
    assert PAGE.read_text() == reference.page(), "run python -m tora.config.reference > docs/config.md"
    script = (
        "import sys; from tora.config.reference import page; page(); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
