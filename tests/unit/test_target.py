"""What `tora eval` and `tora export` take a folder for, and where they look for what its config names."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny import make_text_model

from tora.cli import main
from tora.errors import ConfigError
from tora.run.target import find

CONFIG = """
extends: [base/grpo.yaml, base/lora.yaml]
name: own
num_steps: 1
model: {path: elsewhere}
dataset: {_component_: tora.tasks.dataset.file_dataset, path: own.jsonl}
eval: {dataset: {_component_: tora.tasks.dataset.file_dataset, path: own.jsonl}}
rewards: [{_component_: own_rewards_of_a_target.long}]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    (home / "own.yaml").write_text(CONFIG)
    (home / "own.jsonl").write_text('{"prompt": "p", "answer": "a"}\n')
    (home / "own_rewards_of_a_target.py").write_text("def long(completions, **columns):\n    return [1.0]\n")
    return home / "own.yaml"


def test_a_models_config_finds_what_is_beside_it(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a working directory that has neither the rows nor the rewards."""
    model = make_text_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    cfg = find(str(model), config=str(config)).cfg
    assert cfg.dataset["path"] == str(config.parent / "own.jsonl")
    assert cfg.import_from == [str(config.parent)]
    assert cfg.model.path == str(model)


def test_rewards_beside_the_config_score_an_evaluation(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_text_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    small = ["rollout.engine=torch", "device=cpu", "dtype=fp32", "max_prompt_tokens=64", "max_generated_tokens=4"]
    assert main(["eval", str(model), "--config", str(config), "--out", str(tmp_path / "out"), *small]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["reward"] == 1.0 and result["num_prompts"] == 1


def test_what_is_nothing_of_these_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is neither a run"):
        find(str(tmp_path))
