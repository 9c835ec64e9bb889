"""Tables of completions: in Parquet files, and in the loggers that show them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from datasets import load_dataset
from fake_runs import FakeLearner, FakeRollouts, Warnings, make_run
from fakes import make_group, make_prompt
from PIL import Image
from rich.console import Console
from tiny import picture

from tora.batching.train_batch import group_advantages
from tora.config.load import load_config
from tora.config.schema import RunConfig
from tora.launch.banner import count
from tora.reporting.completions import evaluated_rows, prompt_rows, read_parquet, rollout_rows, write_parquet
from tora.reporting.evaluation import passes_by
from tora.reporting.metrics import MetricLog
from tora.run.loop import train
from tora.types import Group, TrainBatch

LOGGERS = "torchtune.training.metric_logging"
GROUPS = [make_group(make_prompt(0), [0.0, 1.0, 1.0]), make_group(make_prompt(1), [0.5, 0.5])]


def with_images(group: Group) -> Group:
    return replace(group, prompt=replace(group.prompt, images=(picture(32, 16),)))


def cfg(**values: Any) -> RunConfig:
    keys = {
        "advantage": "grpo",
        "credit": "episode",
        "normalize_advantages": True,
        "name": "demo",
        "num_steps": 4,
        "metric_logger": [],
    }
    return cast(RunConfig, SimpleNamespace(**{**keys, **values}))


def test_a_row_has_prompt_completion_rewards_and_advantage(tmp_path: Path) -> None:
    rows = rollout_rows(GROUPS, group_advantages(cfg(), GROUPS))
    write_parquet(rows, tmp_path / "step_1.parquet")
    read = read_parquet(tmp_path / "step_1.parquet")
    assert len(read) == 5 and read[0]["prompt"] == "question 0" and read[0]["completion"] == "10 11 12 13"
    assert [row["reward/fake"] for row in read] == [row["reward"] for row in read] == [0, 1, 1, 0.5, 0.5]
    expected = (np.array([0, 1, 1]) - 2 / 3) / np.std([0, 1, 1], ddof=1)
    assert [row["advantage"] for row in read] == pytest.approx([*expected, 0, 0])
    assert group_advantages(cfg(), []) == []


def test_prompts_of_messages_and_images_read_back_in_datasets(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "image"}]}]
    group = with_images(GROUPS[0])
    group = replace(group, prompt=replace(group.prompt, source=messages))
    rows = evaluated_rows([group, GROUPS[1]], 3, passes_by("fake"))
    assert rows[0]["prompt"] == "system: Be brief.\nuser: <image>"
    assert [row["pass_rate"] for row in rows] == pytest.approx([2 / 3] * 3 + [0] * 2)
    write_parquet(rows, tmp_path / "a.parquet")
    loaded = load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path))
    assert Image.open(io.BytesIO(loaded[0]["images"][0]["bytes"])).size == (32, 16) and loaded[4]["images"] is None
    write_parquet(prompt_rows([group, GROUPS[1]], 3, None), tmp_path / "b.parquet")
    first = read_parquet(tmp_path / "b.parquet")[0]
    assert first["answer"] == "0" and first["pass_rate"] is None and '"role": "system"' in first["prompt"]
    write_parquet([], tmp_path / "none.parquet")
    assert read_parquet(tmp_path / "none.parquet") == []


class WithGroups(FakeRollouts):
    def next_batch(self, step: int, stop_requested: object) -> TrainBatch:
        return replace(super().next_batch(step, lambda: False), groups=tuple(GROUPS))


class Seeing(FakeLearner):
    def step(self, batch: TrainBatch):
        assert batch.groups == (), "texts and images stay on this side"
        return super().step(batch)


class Tables(Warnings):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def completions(self, step: int, groups: Any, advantages: Any) -> None:
        assert list(groups) == GROUPS and len(advantages) == 2
        self.steps.append(step)


@pytest.mark.parametrize(("every", "steps"), [(2, [0, 2, 4]), (0, []), (100, [0])])
def test_the_loop_logs_every_so_many_steps(tmp_path: Path, every: int, steps: list[int]) -> None:
    run = make_run(tmp_path, [Seeing()])
    run.cfg, run.rollouts, run.log = replace(run.cfg, log_completions=every), WithGroups(), Tables()
    train(run)
    assert run.log.steps == steps


def log_everything(folder: Path, logger: dict[str, Any]) -> None:
    log = MetricLog(full_config(folder, logger), folder, console=Console(file=io.StringIO()), run_id="20261126-1")
    log.step(0, {"reward/mean": 0.25, "version": 1.0})
    log.completions(0, [with_images(GROUPS[0]), GROUPS[1]], group_advantages(cfg(), GROUPS))
    log.close()
    assert len(read_parquet(folder / "completions/step_1.parquet")) == 5


def full_config(folder: Path, *loggers: dict[str, Any]) -> RunConfig:
    made = load_config("quickstart", ["name=demo", f"output_dir={folder}"])
    made.metric_logger = list(loggers)
    return made


def test_tensorboard_shows_a_table_and_images(tmp_path: Path) -> None:
    log_everything(tmp_path, {"_component_": f"{LOGGERS}.TensorBoardLogger", "organize_logs": False})
    events = next(tmp_path.glob("events.out.tfevents.*")).read_bytes()
    assert b"reward/mean" in events and b"10 11 12 13" in events and b"completions/0" in events


def test_wandb_shows_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_everything(tmp_path, {"_component_": f"{LOGGERS}.WandBLogger", "mode": "offline"})
    import wandb

    wandb.teardown()
    (table,) = next(tmp_path.glob("wandb/offline-run-*")).rglob("*.table.json")
    assert "10 11 12 13" in table.read_text() and '"Image"' in table.read_text()


def test_trackio_shows_a_table_if_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    log_everything(tmp_path, {"_component_": "tora.reporting.trackio.TrackioLogger", "embed": False})
    assert any(b"10 11 12 13" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_table_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "completions").write_text("a file")
    log = MetricLog(full_config(tmp_path), tmp_path, console=Console(file=io.StringIO()))
    log.completions(0, GROUPS, group_advantages(cfg(), GROUPS))
    log.close()
    assert "no table of completions of step 1" in caplog.text


def test_counts_are_short() -> None:
    assert [count(n) for n in (0, 999, 462_784, 1_720_000_000)] == ["0", "999", "463k", "1.72B"]
