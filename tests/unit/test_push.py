"""Policies on the hub: at the end of a run, at each checkpoint and by `tora export --push`, against a loopback hub."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from hub_server import TOKEN, Hub, running_hub

from tora.cli import main
from tora.config.load import load_config
from tora.errors import ConfigError
from tora.reporting.hub import HubRepo
from tora.reporting.uploads import UPLOADS, Uploads
from tora.trainer.arguments import GRPOConfig

RUN = ["run", "quickstart", "async_rl=false", "rollout.engine=torch", "eval=null", "max_generated_tokens=8"]
RUN += ["batch_size=2", "grpo_samples=2", "rollout.max_refills=0", "sync.canary_every=0", "push_to_hub=true"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def test_a_run_uploads_each_checkpoint_and_export_pushes_another(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*RUN, "num_steps=2", "checkpoint.every=1", f"output_dir={out}", "hub_model_id=me/mine"]) == 0
    assert hub.commits[-1] == ("me/mine", "Step 2") and ("me/mine", "Step 1") in hub.commits
    assert f"pushed  {hub.url}/me/mine" in capsys.readouterr().out and not (out / UPLOADS).exists()
    files = hub.files["me/mine"]
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "reward_curve.png"):
        assert files[name] == (out / "adapter" / name).read_bytes(), name
    assert json.loads(files["tora_run.json"])["step"] == 2 and not hub.private["me/mine"]
    assert b"# quickstart" in files["README.md"] and str(tmp_path).encode() not in files["README.md"]
    words = ["export", str(out), "--checkpoint", "1", "--merge", "--push", "merged", "--private", "--to"]
    assert main([*words, str(tmp_path / "merged")]) == 0
    assert hub.private["someone/merged"] and hub.commits[-1] == ("someone/merged", "Upload out-step1")
    weights = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert hub.files["someone/merged"]["model.safetensors"] == weights
    assert TOKEN not in "".join(path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["hub_model_id=forbidden/x"], "the hub repository forbidden/x cannot be written to: "),
        (["hub_model_id=a--b"], "hub_model_id=a--b is not the name of a repository on the hub"),
        (["name=a b"], "name=a b is not the name of a repository on the hub"),
        (["push_to_hub=false", "hub_model_id=me/x"], "hub_model_id=me/x needs push_to_hub=true."),
        (["hub_strategy=sometimes"], 'hub_strategy="sometimes" must be one of end, every_save'),
    ],
)
def test_a_repository_that_cannot_be_is_refused_before_the_run(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main([*RUN, f"output_dir={tmp_path / 'out'}", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(sentence) and "\n" not in said and not (tmp_path / "out").exists()


def test_without_a_token_a_run_does_not_start(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(ConfigError, match=r"cannot be written to: .*; `hf auth login` or HF_TOKEN gives access$"):
        HubRepo("me/mine")


def test_trls_arguments_are_ours() -> None:
    asked = {"push_to_hub": True, "hub_model_id": "me/x", "hub_strategy": "end", "hub_private_repo": True}
    tree = GRPOConfig("out", **asked).tree(8)
    assert {key: tree[key] for key in asked} == asked


class Ours:
    """Uploads of a run's folder with a policy in it."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        cfg = load_config("quickstart", ["push_to_hub=true", "hub_model_id=me/mine"])
        self.folder, self.hub = folder, hub
        self.uploads = Uploads(cfg, folder, lambda: HubRepo("me/mine"))

    def policy(self, step: int) -> Path:
        path = self.folder / UPLOADS / f"step_{step}"
        path.mkdir(parents=True)
        (path / "adapter_model.safetensors").write_text(str(step))
        return path

    def finish(self, step: int, *, stops: bool = False) -> None:
        self.uploads.finish(self.policy(step), step, lambda: stops)

    def weights(self) -> bytes:
        return self.hub.files["me/mine"]["adapter_model.safetensors"]


def test_a_failing_hub_is_tried_again(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, hub.failures = Ours(tmp_path, hub), 1
    ours.finish(7)
    assert (hub.refused, ours.weights()) == (1, b"7") and "is not on the hub" not in caplog.text


def test_a_hub_that_is_down_never_ends_a_run(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, hub.failures, hub.error = Ours(tmp_path, hub), 10**6, 400  # which huggingface_hub does not try again
    ours.uploads.start(exported := ours.policy(3), 3)
    while exported.exists():
        time.sleep(0.01)
    ours.finish(7)
    first, last = (message for message in caplog.messages if "is not on the hub" in message)
    assert first.startswith("step 3 is not on the hub: the upload to me/mine failed: ")
    assert last.startswith("the trained policy is not on the hub: the upload to me/mine failed: ")
    assert last.endswith(f"; `tora export {tmp_path} --push me/mine` uploads it") and "\n" not in last
    assert hub.refused == 2 and not hub.commits


def test_a_checkpoint_is_left_out_while_another_is_on_its_way(hub: Hub, tmp_path: Path) -> None:
    ours, hub.hold = Ours(tmp_path, hub), threading.Event()
    ours.uploads.start(ours.policy(1), 1)
    ours.uploads.start(second := ours.policy(2), 2)
    assert not second.exists()
    hub.hold.set()
    ours.finish(3)
    assert [message for _, message in hub.commits] == ["Step 1", "Step 3"] and ours.weights() == b"3"


def test_a_stop_waits_for_no_hub(hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, hub.hold = Ours(tmp_path, hub), threading.Event()
    began = time.monotonic()
    ours.finish(3, stops=True)
    assert time.monotonic() - began < 5 and "is not on the hub: stopped" in caplog.text
    hub.hold.set()


def test_a_resumed_run_asks_again_for_a_hub_that_was_down(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = [*RUN, f"output_dir={tmp_path / 'out'}", "hub_model_id=me/mine", "hub_strategy=end"]
    assert main([*words, "num_steps=1"]) == 0
    assert [message for _, message in hub.commits] == ["Step 1"], "once"
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    caplog.set_level(logging.WARNING)
    assert main([*words, "num_steps=2", "resume_from_checkpoint=true"]) == 0
    assert "the hub repository me/mine cannot be written to: " in caplog.text
    assert len(hub.commits) == 1
