"""How long a sequence vLLM must have room for."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_text_model, make_vl_model

from tora.config.load import load_config
from tora.models.length import longest_sequence


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (["max_prompt_tokens=300", "max_generated_tokens=56"], 356),
        (["max_prompt_tokens=456", "max_generated_tokens=56"], 512),
        (["max_prompt_tokens=457", "max_generated_tokens=56"], None),
        (["max_prompt_tokens=300", "max_generated_tokens=56", "rollout.max_model_len=400"], 400),
    ],
)
def test_it_is_what_the_run_asks_for_within_the_models_limit(
    tmp_path: Path, asked: list[str], found: int | None
) -> None:
    model = make_text_model(tmp_path)  # its limit is 512
    assert longest_sequence(load_config("quickstart", [f"model.path={model}", *asked])) == found


def test_a_model_with_images_keeps_its_own_limit(tmp_path: Path) -> None:
    asked = [f"model.path={make_vl_model(tmp_path)}", "max_prompt_tokens=100", "max_generated_tokens=56"]
    assert longest_sequence(load_config("quickstart_vl", asked)) is None
