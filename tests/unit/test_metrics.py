"""The log, its sinks and the report."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import wandb
from fakes import make_rollout
from rich.console import Console

from tora.config.load import load_config
from tora.reporting.console import duration
from tora.reporting.evaluation import EvalResult
from tora.reporting.metrics import MetricLog, read_rows
from tora.reporting.summary import print_summary, reward_curve, smooth
from tora.types import Prompt

LOGGERS = "torchtune.training.metric_logging"
METRICS = {
    "reward/mean": 0.25,
    "rollout/length_mean": 17.0,
    "rollout/truncated_share": 0.05,
    "policy_kl": 1e-3,
    "learner/lr": 1e-4,
    "staleness/max": 1.0,
    "rollout/tokens_per_s": 2100.0,
    "version": 1.0,
}


def make_log(
    folder: Path,
    *,
    first_step: int = 0,
    loggers: list[dict] | None = None,
    terminal: bool = False,
    width: int = 120,
):
    cfg = load_config("quickstart", ["name=demo", "num_steps=4", f"output_dir={folder}"])
    cfg.metric_logger = loggers or []
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width)
    return MetricLog(cfg, folder, first_step, console, "20261126-1"), cast(Any, console.file)


def test_rows_are_on_disk_at_once_and_carry_their_step(tmp_path: Path):
    log, _ = make_log(tmp_path)
    log.evaluation(0, EvalResult(accuracy=0.25, reward=0.5, num_prompts=4, pass_at={1: 0.25, 4: 1.0}))
    log.step(0, {**METRICS, "loss/total": math.nan}, [7, 9])
    rows = [json.loads(line, parse_constant=pytest.fail) for line in log.path.read_text().splitlines()]
    scores = {"reward": 0.5, "num_prompts": 4.0, "accuracy": 0.25, "pass@1": 0.25, "pass@4": 1.0}
    scores |= {"length_mean": 0.0, "truncated_share": 0.0}
    assert rows[0] == {"step": 0, **{f"eval/{name}": value for name, value in scores.items()}}
    assert rows[1] == {"step": 0, **METRICS, "loss/total": None, "prompt_ids": [7, 9]}
    log.close()


def test_resume_removes_the_rows_of_repeated_steps(tmp_path: Path):
    log, _ = make_log(tmp_path)
    for step in range(4):
        log.step(step, {"version": float(step)})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 4, "versi')  # the crash
    log, _ = make_log(tmp_path, first_step=2)
    log.step(2, {"version": 20.0})
    log.close()
    assert [(row["step"], row["version"]) for row in read_rows(log.path)] == [(0, 0), (1, 1), (2, 20)]


def test_the_time_left_is_not_that_of_start_up(tmp_path: Path):
    log, out = make_log(tmp_path)
    for step, seconds in enumerate((60.0, 4.0, 5.0)):
        log.step(step, {**METRICS, "time/step_s": seconds})
    log.close()
    assert [line.split("  ")[-1] for line in out.getvalue().splitlines()] == ["3:00 left", "1:04 left", "0:05 left"]


def test_console_without_a_terminal_prints_plain_lines(tmp_path: Path):
    log, out = make_log(tmp_path)
    log.step(0, METRICS)
    log.evaluation(1, EvalResult(accuracy=0.75, reward=0.5, num_prompts=4))
    rollout = replace(make_rollout([7], 1.0), text="so [bold]\n<answer>2</answer>")
    log.sample(
        Prompt(0, (1,), [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1?"}]}], {}), rollout
    )
    log.close()
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step 1/4  reward 0.250  length 17  cut off 5%  kl 1.0e-03  lr 1.0e-04  2,100 tok/s")
    assert "staleness 1" in lines[0]
    assert lines[1] == "after 1 steps: held-out reward 0.500, accuracy 0.750 over 4 prompts"
    assert lines[2:] == ["  │ <image> 1?", "  │ so [bold]", "  │ <answer>2</answer>", "  reward 1"]
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_console_on_a_terminal_shows_a_panel_that_fits_and_restores_the_cursor(tmp_path: Path, width: int):
    log, out = make_log(tmp_path, terminal=True, width=width)
    log.step(0, {**METRICS, "staleness/max": 0.0})
    log.close()
    shown = out.getvalue()
    assert "1/4" in shown and "left" in shown and "reward 0.250" in shown and "length 17" in shown
    assert ("lr 1.0e-04" in shown) == (width >= 80) and ("2,100 tok/s" in shown) == (width >= 120)
    lines = [re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", line).strip("\r") for line in shown.splitlines()]
    assert max(map(len, lines)) <= min(width, 120), "the panel is cut nowhere"
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_torchtune_loggers_write_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loggers = [
        {"_component_": f"{LOGGERS}.WandBLogger", "project": "tora"},
        {"_component_": f"{LOGGERS}.TensorBoardLogger", "organize_logs": False},
    ]
    log, _ = make_log(tmp_path, loggers=loggers)
    log.step(0, {**METRICS, "kl/mean": math.nan, "policy_kl": math.inf})
    log.evaluation(1, EvalResult(accuracy=0.75, reward=0.5, num_prompts=4))
    log.close()
    wandb.teardown()  # waits for its service process to write the rest of the file
    run = next(tmp_path.glob("wandb/offline-run-*/run-*.wandb")).read_bytes()
    assert b"reward/mean" in run and b"eval/accuracy" in run
    assert b"kl/mean" not in run and b"policy_kl" not in run, "not finite"
    events = next(tmp_path.glob("events.out.tfevents.*")).read_bytes()
    assert b"reward/mean" in events and b"eval/accuracy" in events and b"policy_kl" not in events


def test_reward_curve_draws_both_series(tmp_path: Path):
    from matplotlib.image import imread

    def draw(name: str, rows: list[dict]) -> np.ndarray:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        reward_curve(folder / "metrics.jsonl", folder / "curve.png")
        return imread(folder / "curve.png")[..., :3]

    rewards = [{"step": s, "reward/mean": 0.3 + 0.05 * s} for s in range(10)]
    held_out = [{"step": 0, "eval/reward": 0.3}, {"step": 10, "eval/reward": 0.8}]
    image = draw("run", rewards + held_out)
    assert image.shape == (675, 1200, 3)
    blue = (np.abs(image - np.array([37, 99, 235]) / 255) < 0.02).all(-1)
    orange = (np.abs(image - np.array([194, 65, 12]) / 255) < 0.02).all(-1)
    assert np.ptp(np.nonzero(blue)[1]) > 700 and np.ptp(np.nonzero(orange)[1]) > 700
    draw("other_scale", [{"step": 0, "reward/mean": -3.0}, {"step": 1, "reward/mean": None}, *held_out])
    draw("nothing", [])


def test_smooth_keeps_length_and_level():
    assert smooth(np.ones(50)) == pytest.approx(np.ones(50))
    assert len(smooth(np.array([]))) == 0
    assert smooth(np.array([0.0, 3.0, 0.0])) == pytest.approx([1.5, 1.0, 1.5])


def test_summary_shows_scores_time_traffic_and_adapter(tmp_path: Path):
    adapter = tmp_path / "adapter"

    def summary(before_step: int, after_step: int) -> str:
        console = Console(file=io.StringIO(), width=60)
        print_summary(
            name="demo",
            before=EvalResult(reward=0.3, num_prompts=4, accuracy=0.2),
            before_step=before_step,
            after=EvalResult(reward=0.875, num_prompts=4, accuracy=0.75),
            after_step=after_step,
            num_steps=40,
            seconds=3723,
            result=adapter,
            curve=tmp_path / "reward_curve.png",
            bytes_per_sync=28672,
            console=console,
        )
        return cast(io.StringIO, console.file).getvalue()

    shown = summary(0, 30)
    assert "0.300 -> 0.875 (after step 30)" in shown and "0.200 -> 0.750 (after step 30)" in shown
    assert "40 in 1:02:03" in shown and "28,672" in shown
    assert str(adapter) in "".join(line.strip() for line in shown.splitlines())
    resumed = [line.rstrip() for line in summary(10, 40).splitlines()]
    assert "held-out reward    0.300 (after step 10) -> 0.875" in resumed
    assert duration(59.6) == "1:00"
