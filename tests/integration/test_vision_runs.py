"""Short vision runs: the vision quick-start, and the Qwen3-VL configs on a tiny model with CLEVR's columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from runs import read, steps
from runs import train as short_run
from safetensors.torch import load_file
from tiny import make_vl_model, picture

from tora.config.load import load_config
from tora.errors import ConfigError
from tora.launch.launcher import run

pytest.importorskip("vllm")

HERE = "async_rl=false"
LENGTH = ["rewards.0._component_=tora.rewards.length", "rewards.0.target=2", "rewards.0.limit=40"]
"""A reward that varies within a group even if the model is weak."""
TOWER = "model.train_vision=lora"
DECODER_MODULES, TOWER_MODULES = 4 * 7, 2 * 4 + 2 + 2
"""Adapted linear layers of the quick-start's base: seven in each of four decoder layers; four in each of two vision
blocks, two in the merger and two in the DeepStack merger."""


_SOME = ("2B_lora_grpo_single_device", "4B_full_grpo", "8B_qlora_grpo_single_device")


def train(folder: Path, *overrides: str, config: str = "quickstart_vl") -> list[dict[str, Any]]:
    """The rows of a short run's steps."""
    rows = short_run(config, folder, *overrides)
    assert [row["version"] for row in rows if "canary/gap_mean" in row] == [2]
    (exported,) = [file for kind in ("adapter", "model") for file in (folder / kind).glob("*.safetensors")]
    assert load_file(exported)
    return steps(rows)


@pytest.mark.parametrize(
    ("overrides", "modules"),
    [
        (
            [TOWER, "model.lora_type=dora_cache", "share_prefix=true"],
            DECODER_MODULES + TOWER_MODULES,
        ),
        ([TOWER, "model.quantize_base=true"], DECODER_MODULES + TOWER_MODULES),
        (["rollout.max_pixels=2048", *LENGTH], DECODER_MODULES),
    ],
    ids=["tower, cached DoRA", "tower, NF4", "fewer pixels"],
)
def test_in_one_process(tmp_path: Path, overrides: list[str], modules: int) -> None:
    rows = train(tmp_path / "run", HERE, *overrides)
    assert {row["sync/modules"] for row in rows} == {modules}
    assert max(row["mismatch_kl"] for row in rows) < 1e-9, "vLLM serves the policy that the learner holds"


def test_whole_weights(tmp_path: Path) -> None:
    rows = train(tmp_path / "run", HERE, "model.lora_type=full", "model.train_vision=full", "rollout.engine=vllm")
    assert max(row["mismatch_kl"] for row in rows) < 1e-9
    assert rows[0]["sync/bytes"] > 4 * 350_976, "the tower in float32, and more"


def test_asynchronous(tmp_path: Path) -> None:
    """With images from a prompt process."""
    rows = train(tmp_path / "run", TOWER, "model.lora_type=dora", "max_staleness=1", "prompt_process=true")
    assert {row["sync/modules"] for row in rows} == {DECODER_MODULES + TOWER_MODULES}
    fresh = [row["mismatch_kl"] for row in rows if row["staleness/max"] == 0]
    assert fresh and max(fresh) < 1e-9


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(file.stem, marks=[] if file.stem in _SOME else pytest.mark.slow)
        for file in sorted(Path(__file__).parents[2].glob("configs/qwen3_vl/*.yaml"))
    ],
)
@pytest.mark.usefixtures("datasets_cache")
def test_configs_of_qwen3_vl_on_a_tiny_model(tmp_path: Path, name: str) -> None:
    folder = make_vl_model(tmp_path / "model", tied=not name.startswith("8B"), max_position_embeddings=4096)
    rows = [
        {"image": {"bytes": picture(96, 64, seed=i)}, "problem": "How many?", "solution": f"<answer> {i} </answer>"}
        for i in range(8)
    ]
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "problem": text, "solution": text})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "clevr.parquet")
    overrides = [f"model.path={folder}", "max_generated_tokens=16", "dtype=fp32", *LENGTH]
    for key in ("dataset", "eval.dataset"):
        overrides += [f"{key}.path={tmp_path / 'clevr.parquet'}", f"{key}.split=train"]
    found = train(tmp_path / "run", *overrides, config=f"qwen3_vl/{name}")
    assert max(row["mismatch_kl"] for row in found) < 1e-9


def test_max_pixels_requires_a_vision_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_pixels=4096 needs a model that takes images"):
        train(tmp_path / "run", HERE, "rollout.engine=torch", "rollout.max_pixels=4096", config="quickstart")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("overrides", [[], ["model.lora_type=dora_cache"], ["model.train_vision=lora"]])
def test_the_vision_quickstart_learns(tmp_path: Path, overrides: list[str]) -> None:
    run(load_config("quickstart_vl", [f"output_dir={tmp_path / 'run'}", *overrides]))
    accuracies = [row["eval/accuracy"] for row in read(tmp_path / "run") if "eval/accuracy" in row]
    assert accuracies[0] < 0.4 and accuracies[-1] >= 0.75
