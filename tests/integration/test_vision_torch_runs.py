"""Short vision runs with the torch engine, in this process and on Ray."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runs import steps
from runs import train as short_run
from transformers import Qwen3VLForConditionalGeneration

HERE = "async_rl=false"
DECODER, TOWER_LINEARS = 4 * 7, 2 * 4 + 2 + 2
"""Linear layers of the quick-start's base: seven in each of four decoder layers; four in each of two vision blocks, two
in the merger and two in the DeepStack merger."""
TOWER = TOWER_LINEARS + 2 * 2 + 2 + 2
"""Including norms, the patch embedding and the position embedding."""


def train(folder: Path, *overrides: str) -> list[dict[str, float]]:
    rows = short_run("quickstart_vl", folder, "rollout.engine=torch", *overrides)
    assert [row["version"] for row in rows if "canary/gap_mean" in row] == [2]
    return steps(rows)


@pytest.mark.parametrize(
    ("overrides", "modules"),
    [
        (["model.train_vision=lora", "model.lora_type=dora_cache"], DECODER + TOWER_LINEARS),
        (["model.train_vision=full", "share_prefix=true", "activation_checkpointing=full"], DECODER + TOWER),
        (["loss.kl_coeff=0.01", "ppo_epochs=2", "model.quantize_base=true"], DECODER),
    ],
    ids=["tower, cached DoRA", "tower, whole", "decoder, NF4"],
)
def test_in_one_process(tmp_path: Path, overrides: list[str], modules: int) -> None:
    rows = train(tmp_path / "run", HERE, *overrides)
    assert {row["sync/modules"] for row in rows} == {modules}
    assert max(row["mismatch_kl"] for row in rows) < 1e-9, "engine and learner are one model"


def test_a_resumed_run_has_the_metrics_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    overrides = [HERE, "model.lora_type=dora", "model.train_vision=lora"]
    last = train(whole, *overrides)[-1]
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_000003")
    again = train(resumed, *overrides, "resume_from_checkpoint=true")
    assert [row["version"] for row in again] == [1, 2, 3]
    for key in ("loss/total", "reward/mean", "learner/grad_norm", "mismatch_kl"):
        assert again[-1][key] == last[key], key


@pytest.mark.parametrize("train_vision", ["none", "full"])
def test_all_weights(tmp_path: Path, train_vision: str) -> None:
    rows = train(tmp_path / "run", HERE, "model.lora_type=full", f"model.train_vision={train_vision}")
    assert max(row["mismatch_kl"] for row in rows) < 1e-9
    assert Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "run" / "model").num_parameters() > 0


@pytest.mark.slow
def test_asynchronous(tmp_path: Path) -> None:
    """Every sync sends the whole tower to the engine's copy."""
    rows = train(tmp_path / "run", "max_staleness=0", "model.train_vision=full")
    assert max(row["mismatch_kl"] for row in rows) < 1e-9
    assert rows[0]["sync/bytes"] > 4 * 350_976, "the tower in float32, and the adapters"
