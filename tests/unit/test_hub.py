"""Models of the hub, from a local stand-in of its HTTP API and from huggingface_hub's cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tora.config.schema import ModelConfig
from tora.errors import ConfigError
from tora.models.hub import fetched, named, origin

BASE = Path(__file__).parents[2] / "configs" / "bases" / "chain_sum"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny"


class Hub(BaseHTTPRequestHandler):
    """One model, whose files are those of the quick-start's base."""

    def do_GET(self) -> None:
        names = [file.name for file in BASE.iterdir()]
        if self.path.startswith((f"/api/models/{NAME}/revision/main", f"/api/models/{NAME}/revision/{COMMIT}")):
            siblings = [{"rfilename": name} for name in [*names, "training.log"]]
            self._answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode())
        elif self.path.startswith(f"/api/models/{NAME}/tree/"):
            files = [{"type": "file", "path": n, "size": (BASE / n).stat().st_size, "oid": "0"} for n in names]
            self._answer(json.dumps(files).encode())
        elif self.path.startswith(f"/{NAME}/resolve/") and (name := self.path.rpartition("/")[2]) in names:
            self._answer((BASE / name).read_bytes())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        for key, value in (("Content-Length", str(len(body))), ("X-Repo-Commit", COMMIT), ("ETag", f'"{hash(body)}"')):
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def tora(folder: Path, endpoint: str, *words: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """A command with an empty cache of its own; huggingface_hub reads these variables when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    command = [sys.executable, "-m", "tora", *words]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def fetch(folder: Path, endpoint: str, name: str) -> subprocess.CompletedProcess[str]:
    code = f"""
from tora.config.schema import ModelConfig
from tora.errors import ConfigError
from tora.models.hub import fetched
try:
    print(fetched(ModelConfig(path={name!r})).path)
except ConfigError as error:
    print(error)
"""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)


def test_the_hub_is_asked_for_what_is_no_folder(tmp_path: Path, endpoint: str) -> None:
    folder = Path(fetch(tmp_path, endpoint, NAME).stdout.strip())
    assert folder == tmp_path / "hub" / "models--someone--tiny" / "snapshots" / COMMIT
    assert (folder / "model.safetensors").read_bytes() == (BASE / "model.safetensors").read_bytes()
    assert not (folder / "training.log").exists()
    sentence = fetch(tmp_path, endpoint, "someone/else").stdout.strip()
    assert sentence.startswith("model.path=someone/else is not a folder, and the hub gives no such model: ")
    assert "\n" not in sentence


@pytest.mark.slow
def test_a_run_downloads_its_model_and_pins_the_commit(tmp_path: Path, endpoint: str) -> None:
    short = ["run", "quickstart", "async_rl=false", "rollout.engine=torch", "eval=null", "max_generated_tokens=8"]
    short += ["num_steps=1", "batch_size=2", "grpo_samples=2", "rollout.max_refills=0", f"model.path={NAME}"]
    run = tora(tmp_path, endpoint, *short, "output_dir=one")
    assert run.returncode == 0, run.stderr
    written = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())["model"]
    assert (written["path"], written["revision"]) == (NAME, COMMIT)
    adapter = json.loads((tmp_path / "one" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == (NAME, COMMIT)
    cache = tmp_path / "hf" / "hub" / "models--someone--tiny" / "snapshots" / COMMIT
    assert (cache / "model.safetensors").is_file() and not (cache / "training.log").exists()
    # without a network: the cache, also for a resumed run, which takes the commit from its own config
    again = [*short, "output_dir=one", "num_steps=2", "resume_from_checkpoint=true"]
    assert (resumed := tora(tmp_path, "http://127.0.0.1:1", *again, offline=True)).returncode == 0, resumed.stderr


@pytest.mark.slow
def test_what_the_hub_does_not_have_is_one_sentence(tmp_path: Path, endpoint: str) -> None:
    run = tora(tmp_path, endpoint, "run", "quickstart", "async_rl=false", "model.path=someone/else")
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert "model.path=someone/else is not a folder, and the hub gives no such model: " in run.stderr
    assert not (tmp_path / "outputs").exists()


def test_names_and_folders(tmp_path: Path) -> None:
    assert (
        fetched(ModelConfig(path=str(tmp_path)))
        == named(ModelConfig(path=str(tmp_path)))
        == ModelConfig(path=str(tmp_path))
    )
    snapshot = tmp_path / "models--a--b.c" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    found = origin(str(snapshot))
    assert found is not None and (found.name, found.revision) == ("a/b.c", COMMIT)
    assert named(fetched(ModelConfig(path=str(snapshot)))) == ModelConfig(path="a/b.c", revision=COMMIT)
    with pytest.raises(ConfigError, match=r"model.revision=x is for a model of the hub, but model.path=.* is a folder"):
        fetched(ModelConfig(path=str(tmp_path), revision="x"))
