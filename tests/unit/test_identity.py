"""One id for the life of a run, and one command for its start and every retry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_runs import FakeLearner, make_run
from runs import SHORT, read, steps

from tora.cli import main
from tora.config.load import load_config
from tora.errors import ConfigError
from tora.launch.launcher import run
from tora.run.checkpoints import RunState
from tora.run.folder import LOCK, held
from tora.run.identity import IDENTITY, is_finished, new_run_id, run_id_in, write_identity
from tora.run.recovery import train_and_export

HERE = [*SHORT, "async_rl=false", "rollout.engine=torch", "eval=null", "checkpoint.every=1", "checkpoint.keep=9"]
AUTO = "resume_from_checkpoint=auto"


def start(folder: Path, *overrides: str) -> bool:
    return run(load_config("quickstart", [*HERE, f"output_dir={folder}", *overrides]))


def ids(folder: Path) -> dict[str, Any]:
    """Where the run's id is written."""
    checkpoints = {
        c.name: json.loads((c / "run_state.json").read_text())["run_id"] for c in folder.glob("checkpoints/*")
    }
    return {
        "config": run_id_in(folder),
        "adapter": json.loads((folder / "adapter" / IDENTITY).read_text()),
        **checkpoints,
    }


def test_one_command_starts_continues_and_finds_a_finished_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    assert start(folder, AUTO, "num_steps=1")
    name = run_id_in(folder)
    assert name and ids(folder) == {"config": name, "adapter": {"run_id": name, "step": 1}, "step_000001": name}

    assert start(folder, AUTO, "num_steps=2")
    assert [row["version"] for row in steps(read(folder))] == [1, 2]
    assert ids(folder) == {
        "config": name,
        "adapter": {"run_id": name, "step": 2},
        **dict.fromkeys(["step_000001", "step_000002"], name),
    }
    assert f"run {name} goes on from step 1 in {folder}" in caplog.messages

    rows = (folder / "metrics.jsonl").read_bytes()
    assert start(folder, AUTO, "num_steps=2")
    assert (folder / "metrics.jsonl").read_bytes() == rows, "a finished run does nothing"
    assert any("has finished its 2 steps" in said for said in caplog.messages)

    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert start(folder, "num_steps=2") and run_id_in(folder) == name, "auto is the default of a submitted job"
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    assert start(folder, "num_steps=1")
    assert run_id_in(folder) != name == run_id_in(tmp_path / "run.1"), "and false elsewhere: another run, another id"

    state = folder / "checkpoints/step_000001/run_state.json"
    state.write_text(state.read_text().replace(str(run_id_in(folder)), "another"))
    with pytest.raises(ConfigError, match="holds no intact checkpoint; step_000001 is damaged"):
        start(folder, AUTO)


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("run_id: a\nname: quickstart\n")
    with held(tmp_path / "run", resumes=False) as folder:
        folder.start_over()
    assert [p.name for p in sorted((tmp_path / "run.1").iterdir()) if p.name != LOCK] == ["config.yaml"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "quickstart", *HERE, f"output_dir={tmp_path}", "num_steps=1"]
    assert main(words) == 0
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace(str(run_id_in(tmp_path)), "another"))
    assert main([*words, "resume_from_checkpoint=true", "num_steps=2"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "of run another" in said[0]


def test_an_id_survives_a_lost_learner(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, [FakeLearner(dies_in=1), FakeLearner(dies_in=3), FakeLearner()], state=RunState(run_id="a")
    )
    train_and_export(run)
    assert run.state.run_id == "a"
    assert {json.loads(f.read_text())["run_id"] for f in tmp_path.glob("checkpoints/*/run_state.json")} == {"a"}


def test_ids_differ_and_suit_loggers(tmp_path: Path) -> None:
    made = {new_run_id() for _ in range(99)}
    assert len(made) == 99 and all(len(name) < 64 and name.replace("-", "").isalnum() for name in made)
    assert not is_finished(tmp_path, 3) and run_id_in(tmp_path) is None
    write_identity(tmp_path, "a", 3)
    assert is_finished(tmp_path, 3) and not is_finished(tmp_path, 4)
    for text in ("", "[]", "{", '{"step": null}'):
        (tmp_path / IDENTITY).write_text(text)
        assert not is_finished(tmp_path, 3)


@pytest.mark.parametrize("value", ["maybe", "1", "automatic", "[true]"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="must be one of true, false, auto; the nearest is"):
        load_config("quickstart", [f"resume_from_checkpoint={value}"])
