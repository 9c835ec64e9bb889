"""Loggers know which run they log, across its resumes, and nobody writes a secret down."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import wandb

from tora.cli import main
from tora.config.load import dump_yaml, load_config
from tora.config.resuming import check_resumed
from tora.config.secrets import HIDDEN, redacted
from tora.errors import ConfigError
from tora.reporting.metrics import MetricLog, read_rows
from tora.run.identity import run_id_in

WANDB = "torchtune.training.metric_logging.WandBLogger"
HERE = ["async_rl=false", "rollout.engine=torch", "eval=null", "batch_size=2", "grpo_samples=4"]
PLANTED = "planted-0123456789abcdef"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def wandb_files(folder: Path) -> list[Path]:
    wandb.teardown()  # waits for its service process to write the rest of the files
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def test_wandb_knows_a_resumed_run_and_its_config(tmp_path: Path, offline: None) -> None:
    cfg = load_config("quickstart", ["name=a", "optimizer.lr=1e-3", f"output_dir={tmp_path}"])
    cfg.metric_logger = [{"_component_": WANDB, "project": "tora", "group": "sweep-7"}]
    for step, lr in ((0, 1e-3), (1, 1e-4)):
        cfg.optimizer["lr"] = lr
        log = MetricLog(cfg, tmp_path, step, run_id="20261126-x")
        assert wandb.run is not None
        assert (wandb.run.id, wandb.run.name, wandb.run.group) == ("20261126-x", "a", "sweep-7")
        assert wandb.run.config["optimizer"]["lr"] == lr and wandb.run.config["grpo_samples"] == cfg.grpo_samples
        log.step(step, {"reward/mean": 0.5})
        log.close()
        del log  # torchtune's logger ends whatever run there is when it is collected
    files = wandb_files(tmp_path)
    assert {file.name for file in files} == {"run-20261126-x.wandb"} and b"grpo_samples" in files[0].read_bytes()


def test_the_user_may_name_a_run_otherwise(tmp_path: Path, offline: None) -> None:
    cfg = load_config("quickstart", [f"output_dir={tmp_path}"])
    cfg.metric_logger = [{"_component_": WANDB, "id": "mine", "name": "better"}]
    log = MetricLog(cfg, tmp_path, run_id="20261126-x")
    assert wandb.run is not None and (wandb.run.id, wandb.run.name) == ("mine", "better")
    log.close()
    wandb.teardown()


FAKE_TRACKIO = """
import json, os
def _note(*what):
    with open(os.environ["NOTES"], "a") as file: file.write(json.dumps(what) + "\\n")
def init(project, name=None, group=None, config=None, resume="never"):
    _note(project, name, group, resume, config["name"])
def log(metrics, step=None): _note(metrics, step)
def finish(): _note("finish")
"""


def test_trackio_gets_name_group_and_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in: the real package needs a web framework."""
    cfg = load_config("quickstart", [f"output_dir={tmp_path}", "name=a"])
    cfg.metric_logger = [{"_component_": "tora.reporting.trackio.TrackioLogger", "group": "g"}]
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="pip install trackio"):
        MetricLog(cfg, tmp_path)
    monkeypatch.delitem(sys.modules, "trackio")
    (tmp_path / "trackio.py").write_text(FAKE_TRACKIO)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    for step in range(2):
        log = MetricLog(cfg, tmp_path, step, run_id="7")
        log.step(step, {"x": 1.0})
        log.close()
    sys.modules.pop("trackio")
    start, end = '["tora", "a-7", "g", "allow", "a"]', '["finish"]'
    assert (tmp_path / "notes").read_text().splitlines() == [
        *(start, '[{"x": 1.0}, 0]', end),
        *(start, '[{"x": 1.0}, 1]', end),
    ]


class Keyed:
    """A logger that needs secrets."""

    def __init__(self, api_key: str, url: str) -> None:
        assert (api_key, url) == (PLANTED, f"https://me:{PLANTED}@host/x")

    def log_dict(self, payload: Any, step: int) -> None: ...

    def close(self) -> None: ...


def test_a_planted_token_is_written_nowhere(
    tmp_path: Path,
    offline: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED + "-of-the-hub")
    monkeypatch.setenv("RAY_AUTH_TOKEN", PLANTED + "-of-ray")
    config = tmp_path / "config.yaml"
    config.write_text(
        "extends: quickstart.yaml\nname: planted-run\nmetric_logger:\n"
        f"- {{_component_: test_loggers.Keyed, api_key: {PLANTED}, url: 'https://me:{PLANTED}@host/x'}}\n"
        f"- {{_component_: {WANDB}, notes: '${{oc.env:HF_TOKEN}} of me'}}\n"
    )
    words = ["run", str(config), *HERE, f"output_dir={tmp_path / 'run'}", "checkpoint.every=1"]
    assert main([*words, "num_steps=1"]) == 0
    assert main([*words, "num_steps=2", "resume_from_checkpoint=true", "max_prompt_tokens=99"]) == 0
    wandb.teardown()
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file() and not file.is_symlink()]
    # wandb.init was given the notes for wandb to show, which is the user's wish
    told = {file.name for file in files if PLANTED.encode() in file.read_bytes()}
    assert told <= {f"run-{run_id_in(tmp_path / 'run')}.wandb"}
    assert all(PLANTED + "-of-ray" not in file.read_text(errors="ignore") for file in files)
    written = (tmp_path / "run/config.yaml").read_text()
    assert "api_key: '***'" in written and "https://***@host/x" in written and "'*** of me'" in written
    said = "".join([*capfd.readouterr(), *caplog.messages])
    assert "max_prompt_tokens 1024 -> 99" in said
    where = said.find(PLANTED)
    assert where < 0, said[max(0, where - 200) : where + 50]


def test_what_is_hidden_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", PLANTED)
    monkeypatch.setenv("A_TOKEN", "short")
    tree = {"api_key": "x", "max_prompt_tokens": 5, "hub": {"token": "t", "text": "short"}, "list": [PLANTED, "a b"]}
    hidden = {"api_key": HIDDEN, "max_prompt_tokens": 5, "hub": {"token": HIDDEN, "text": "short"}}
    assert redacted(tree) == {**hidden, "list": ["${oc.env:WANDB_API_KEY}", "a b"]}
    assert redacted(tree, references=False) == {**hidden, "list": [HIDDEN, "a b"]}
    assert redacted(redacted(tree)) == redacted(tree) and tree["api_key"] == "x"
    assert redacted({"token": None, "password": ""}) == {"token": None, "password": ""}


def test_a_secret_from_the_environment_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", PLANTED)
    words = ["metric_logger=[{_component_: test_loggers.Keyed, api_key: '${oc.env:SOME_TOKEN}', url: ''}]"]
    cfg = load_config("quickstart", words)
    (tmp_path / "config.yaml").write_text(dump_yaml(cfg))
    assert PLANTED not in dump_yaml(cfg) and load_config(str(tmp_path / "config.yaml")) == cfg
    assert check_resumed(tmp_path / "config.yaml", cfg) == []


class Refusing(Keyed):
    def __init__(self) -> None:
        raise PermissionError("the server says no\nand more")


@pytest.mark.parametrize(
    ("path", "words"), [(WANDB, "No API key configured. Use `wandb login`"), ("test_loggers.Refusing", "says no$")]
)
def test_a_logger_that_cannot_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, words: str
) -> None:
    for name, value in (("WANDB_API_KEY", ""), ("HOME", str(tmp_path)), ("NETRC", str(tmp_path / "netrc"))):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    cfg = load_config("quickstart", [f"output_dir={tmp_path}"])
    cfg.metric_logger = [{"_component_": path}]
    with pytest.raises(ConfigError, match=words) as caught:
        MetricLog(cfg, tmp_path, run_id="7")
    assert str(caught.value).startswith(f"metric_logger {path} cannot start: ") and "\n" not in str(caught.value)


class Away(Keyed):
    """Its server is away at some steps."""

    rows: ClassVar[list[int]] = []

    def __init__(self) -> None: ...

    def log_dict(self, payload: Any, step: int) -> None:
        if step in (1, 2):
            raise ConnectionError("the server is away")
        self.rows.append(step)


def test_a_logger_that_fails_costs_its_rows_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = load_config("quickstart", [f"output_dir={tmp_path}"])
    cfg.metric_logger = [{"_component_": "test_loggers.Away"}]
    log = MetricLog(cfg, tmp_path)
    for step in range(4):
        log.step(step, {"x": 1.0})
    log.close()
    assert importlib.import_module("test_loggers").Away.rows == [0, 3]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    (sentence,) = (message for message in caplog.messages if "metric logger" in message)
    assert sentence == "the metric logger Away failed and lacks rows from now on: the server is away"


class Closing(Keyed):
    """One that cannot say goodbye, and one that can."""

    closed: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    def close(self) -> None:
        self.closed.append(self.name)
        if self.name == "bad":
            raise ConnectionError("the server is away")


def test_a_logger_that_does_not_close_leaves_the_others_to_close(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = load_config("quickstart", [f"output_dir={tmp_path}"])
    cfg.metric_logger = [{"_component_": "test_loggers.Closing", "name": name} for name in ("bad", "good")]
    MetricLog(cfg, tmp_path).close()
    assert importlib.import_module("test_loggers").Closing.closed == ["bad", "good"]
    assert "the metric logger Closing did not close: the server is away" in caplog.text
