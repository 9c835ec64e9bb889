"""Jobs on a real Ray head with token authentication, submitted as docs/cluster.md says."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray_head import Head, ray_head
from runs import read, steps

from tora.run.identity import run_id_in

SHORT = ["num_steps=3", "batch_size=4", "grpo_samples=4", "eval=null", "rollout.concurrency=4", "num_threads=1"]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    before = set(os.listdir("/dev/shm"))
    with ray_head() as running:
        yield running
    assert {
        name for name in set(os.listdir("/dev/shm")) - before if name.startswith(("psm_", "vllm_", "plasma"))
    } == set()


def drivers(head: Head) -> list[psutil.Process]:
    return [p for p in head.processes() if "tora run" in " ".join(p.cmdline())]


def test_the_head_listens_on_loopback_and_requires_the_token(head: Head) -> None:
    listening = {c.laddr.ip for p in head.processes() for c in p.net_connections("tcp") if c.status == "LISTEN"}
    assert listening and listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{head.dashboard_port}/api/jobs/", timeout=10)


def test_a_submitted_command_runs_in_a_copy_of_this_folder(head: Head) -> None:
    script = (
        "import os, tora; from tora.launch.ray_cluster import output_folder;"
        "print('tora from', tora.__file__); print('outputs in', output_folder('outputs/x'))"
    )
    done = head.ray(
        "job", "submit", "--working-dir", ".", "--", "sh", "-c", f'python -c "{script}" && tora validate quickstart'
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runtime_resources/working_dir_files" in done.stdout.partition("tora from ")[2]
    assert f"outputs in {Path.home()}/outputs/x" in done.stdout, "outside the copy, which Ray deletes"
    assert "quickstart: OK" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_submit_runs_the_quickstart(head: Head, tmp_path: Path, engine: str) -> None:
    head.environment["TORA_OUTPUT_ROOT"] = str(tmp_path)
    done = head.run("deploy/submit.sh", "quickstart", *SHORT, f"rollout.engine={engine}", "output_dir=runs/first")
    assert done.returncode == 0, done.stdout + done.stderr
    name = done.stdout.partition("Job '")[2].partition("'")[0]
    assert head.get(f"/api/jobs/{name}")["status"] == "SUCCEEDED"
    folder = tmp_path / "runs/first"
    assert str(folder / "adapter") in "".join(head.get(f"/api/jobs/{name}/logs")["logs"].split())
    assert [row["version"] for row in steps(read(folder))] == [1, 2, 3]
    assert sorted(f.name for f in (folder / "checkpoints").iterdir()) == ["step_000003"]
    assert not drivers(head)


@pytest.mark.slow
def test_a_stopped_job_leaves_a_checkpoint_and_the_next_goes_on_from_it(head: Head, tmp_path: Path) -> None:
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": "600", "TORA_OUTPUT_ROOT": str(tmp_path)}

    def submit(num_steps: int, *options: str) -> None:
        words = [*SHORT, f"num_steps={num_steps}", "rollout.engine=torch", "output_dir=run"]
        submitted = head.ray(
            *("job", "submit", *options, "--working-dir", "."),
            *("--runtime-env-json", json.dumps({"env_vars": variables})),
            *("--", "tora", "run", "quickstart", *words),
        )
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr

    submit(500, "--no-wait", "--submission-id", "endless")
    deadline = time.monotonic() + 240
    while not steps(read(tmp_path / "run")):
        assert time.monotonic() < deadline, head.ray("job", "logs", "endless").stdout
        time.sleep(0.5)
    assert head.ray("job", "stop", "endless").returncode == 0
    assert head.get("/api/jobs/endless")["status"] == "STOPPED"
    done = len(steps(read(tmp_path / "run")))
    said = head.get("/api/jobs/endless/logs")["logs"]
    assert (tmp_path / "run/checkpoints" / f"step_{done:06d}" / "weights.safetensors").exists(), said
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists(), "the run ended by itself and was not killed"
    _, alive = psutil.wait_procs(drivers(head), timeout=10)
    assert not alive
    name = run_id_in(tmp_path / "run")
    submit(done + 2)
    assert run_id_in(tmp_path / "run") == name and not (tmp_path / "run.1").exists()
    assert [row["version"] for row in steps(read(tmp_path / "run"))] == [*range(1, done + 3)]
