"""Configs that a launcher rejects before it starts anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from learners import config
from tiny import make_text_model

from tora.errors import ConfigError
from tora.launch.launcher import run


@pytest.mark.parametrize("key", ["path", "adapter_path"])
def test_a_run_does_not_rename_what_it_starts_from(tmp_path: Path, key: str) -> None:
    """For example, a second run in the folder whose adapter it starts from."""
    folder = make_text_model(tmp_path / "model")
    cfg = config(folder, output_dir=str(tmp_path / "run"))
    inside = tmp_path / "run" / "adapter"
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **{key: str(inside)}))
    cfg.rollout.engine = "torch"
    with pytest.raises(ConfigError, match=rf"model.{key}=.*adapter is in output_dir=.*run, which a new run renames"):
        run(cfg)
    assert not (tmp_path / "run").exists()
