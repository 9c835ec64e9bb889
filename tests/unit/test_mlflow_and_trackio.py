"""MLflow and trackio as they are, with stores on disk; each is skipped where it is not installed."""

from __future__ import annotations

import io
import json
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import make_group, make_prompt
from rich.console import Console
from tiny import picture

from tora.config.load import load_config
from tora.errors import ConfigError
from tora.reporting.metrics import MetricLog

MLFLOW, TRACKIO = "tora.reporting.mlflow.MLflowLogger", "tora.reporting.trackio.TrackioLogger"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, where both keep their files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    yield tmp_path


def log_twice(folder: Path, **logger: str) -> None:
    """A run that is resumed with another learning rate."""
    cfg = load_config("quickstart", ["name=a", f"output_dir={folder}"])
    cfg.metric_logger = [logger]
    for step, lr in ((0, 1e-3), (1, 1e-4)):
        cfg.optimizer["lr"] = lr
        log = MetricLog(cfg, folder, step, console=Console(file=io.StringIO()), run_id="20261126-x")
        log.step(step, {"reward/mean": 0.5 + step, "eval/pass@1": 0.25, "loss": float("nan")})
        group = make_group(make_prompt(0), [1.0, 0.0])
        shown = replace(group, prompt=replace(group.prompt, images=(picture(32, 16),)))
        log.completions(step, [shown], [[1.0, -1.0]])
        log.close()


def test_mlflow_has_metrics_parameters_and_tables_of_one_run(folder: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    where = f"sqlite:///{folder / 'mlflow.db'}"
    log_twice(folder, _component_=MLFLOW, tracking_uri=where, team="ours")
    client = mlflow.MlflowClient(tracking_uri=where)
    (run,) = client.search_runs([client.get_experiment_by_name("tora").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["team"]) == ("a", "FINISHED", "ours")
    history = client.get_metric_history(run.info.run_id, "reward/mean")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.5), (1, 1.5)]
    assert run.data.metrics.keys() == {"reward/mean", "eval/pass_1"}, "what is not finite is left out"
    assert run.data.params["optimizer.lr"] == "0.001" and run.data.params["grpo_samples"] == "16"
    files = {
        file.path: client.download_artifacts(run.info.run_id, file.path)
        for file in client.list_artifacts(run.info.run_id)
    }
    assert "lr: 0.0001" in Path(files["config.yaml"]).read_text()
    table = json.loads((Path(files["completions"]) / "step_2.json").read_text())
    assert {"advantage", "images"} <= set(table["columns"]) and len(table["data"]) == 2
    assert list(folder.rglob("artifacts/**/*.png")), "the images are artifacts"


def test_trackio_has_metrics_and_a_table_of_one_run(folder: Path) -> None:
    pytest.importorskip("trackio")
    log_twice(folder, _component_=TRACKIO, project="ours")
    (database,) = (folder / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {"a-20261126-x"}
    logged = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert [(step, m["reward/mean"]) for step, m in logged if "reward/mean" in m] == [(0, 0.5), (1, 1.5)]
    tables = [m["completions"] for _, m in logged if "completions" in m]
    assert len(tables) == 2 and "advantage" in json.dumps(tables) and "trackio.image" in json.dumps(tables)
    assert list((folder / "trackio" / "media").rglob("*.png"))


@pytest.mark.parametrize(("path", "name"), [(MLFLOW, "mlflow"), (TRACKIO, "trackio")])
def test_without_the_package_one_sentence_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, path: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"^{path} needs .*: pip install {name}\\.$"):
        log_twice(folder, _component_=path)
