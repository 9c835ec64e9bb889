"""Ray sessions: where they listen, which GPUs and nodes an actor gets, and where outputs go."""

from __future__ import annotations

import http.client
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from learners import config

from tora.config.schema import EvalConfig, RolloutConfig
from tora.errors import ConfigError
from tora.launch.on_ray import OnRay
from tora.launch.ray_cluster import gpus_per_device, output_folder, ray_session, role_resources


def test_a_private_session_listens_on_loopback_requires_a_token_and_is_quiet(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import ray
    from ray._common.usage.usage_lib import usage_stats_enabled

    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_IGNORE_UNHANDLED_ERRORS"):
        monkeypatch.delenv(name, raising=False)

    class Rank:
        def works(self) -> None: ...

        def fails(self) -> None:
            raise ValueError("nobody hears this")

    monkeypatch.setattr(logging.getLogger("ray"), "propagate", True)
    before = psutil.Process().children(recursive=True)
    with ray_session(num_cpus=1):
        started = [p for p in psutil.Process().children(recursive=True) if p not in before]
        listening = {c.laddr for p in started for c in p.net_connections("inet") if c.status == "LISTEN"}
        assert {address.ip for address in listening} <= {"127.0.0.1", "::ffff:127.0.0.1"}
        answers = [http_status(f"http://127.0.0.1:{address.port}/api/job_agent/jobs/x") for address in listening]
        assert 401 in answers, "the agent, which can run jobs, requires the token"
        assert not any("client.server" in " ".join(p.cmdline()) for p in started)
        assert not usage_stats_enabled()
        assert role_resources("learner") == {}
        rank = ray.remote(Rank).remote()
        answer = rank.fails.remote()
        ray.get(rank.works.remote())
        del answer  # as that of the second of two ranks, for which nobody asks
        time.sleep(1)
    assert not caplog.messages
    assert not ray.is_initialized()
    assert not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


_SESSION = """
import time
from tora.launch.signals import Stop
stop = Stop()
stop.listen()
stop.let_save(True)
from tora.launch.leftovers import Leftovers
stop.leftovers = Leftovers()
from tora.launch.ray_cluster import ray_session
with ray_session(1, scratch=stop.leftovers.scratch):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_sigterm_is_a_request_to_stop_though_ray_takes_it_for_a_crash() -> None:
    """Ray's C++ handler prints a stack and aborts the process three seconds later."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", _SESSION]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables, start_new_session=True
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(3.5)
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) == 130
        assert child.stderr.read() == "\nstopping after this step; again to end now\n\nending now\n"


def http_status(url: str) -> int | None:
    """None if the listener does not speak HTTP."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None


@pytest.mark.parametrize(
    ("total", "num_actors", "device", "each"),
    [
        (8, 3, "auto", 1.0),
        (1, 2, "auto", 0.5),
        (1, 2, "cuda", 0.5),
        (2, 3, "auto", 0.5),
        (3, 4, "auto", 0.5),
        (2, 5, "auto", 1 / 3),
        (0, 2, "auto", 0.0),
        (0, 2, "cuda", 1.0),
        (8, 2, "cpu", 0.0),
    ],
)
def test_gpus_each(total: int, num_actors: int, device: str, each: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, **({"GPU": float(total)} if total else {})})
    assert gpus_per_device(num_actors, device) == each


@pytest.mark.parametrize(("total", "device", "each"), [(0, "auto", 1.0), (1, "cuda", 1.0), (4, "cpu", 0.0)])
def test_declared_gpus_are_waited_for(total: int, device: str, each: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, **({"GPU": float(total)} if total else {})})
    assert gpus_per_device(8, device, whole=True) == each


@pytest.mark.parametrize("total", range(1, 9))
def test_shares_of_gpus_can_be_placed(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": float(total)})
    for wanted in range(1, 25):
        share = gpus_per_device(wanted, "auto")
        on_each = round(1 / share)
        assert share == 1 / on_each, "a GPU holds a whole number of devices"
        assert on_each * total >= wanted, "all of them find a place"


@pytest.mark.parametrize("change", [{"learner_ranks": 2}, {"rollout": RolloutConfig(tensor_parallel=2)}])
def test_what_needs_whole_gpus_is_refused_on_shares(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(Path("model"), async_rl=True, **change)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 3.0})
    OnRay(cfg)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 2.0})
    with pytest.raises(ConfigError, match="needs whole GPUs"):
        OnRay(cfg)


def test_a_refusal_names_all_that_need_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(Path("model"), async_rl=True, learner_ranks=2, eval=EvalConfig(dataset={}, num_workers=1))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 4.0})
    OnRay(cfg)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 3.0})
    with pytest.raises(ConfigError, match=r"eval\.num_workers=1 the run needs 4"):
        OnRay(cfg)


def test_actors_use_nodes_that_are_marked_for_their_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "tora_rollout": 2.0})
    assert role_resources("learner") == {}
    assert list(role_resources("learner", marked=True)) == ["tora_learner"], "it is waited for"
    assert role_resources("rollout", marked=False) == {}
    assert list(role_resources("rollout")) == ["tora_rollout"] and 0 < role_resources("rollout")["tora_rollout"] <= 0.01


def test_output_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORA_OUTPUT_ROOT", raising=False)
    assert output_folder("outputs/a") == tmp_path / "outputs/a"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert output_folder("outputs/a") == Path.home() / "outputs/a"
    monkeypatch.setenv("TORA_OUTPUT_ROOT", "/shared")
    assert output_folder("outputs/a") == Path("/shared/outputs/a")
    assert output_folder("/abs/a") == Path("/abs/a")
    assert output_folder("~/a") == Path.home() / "a"
