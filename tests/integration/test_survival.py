"""Runs whose processes are killed or stopped by signals, with real Ray and real engines."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from histories import check_history, check_nothing_lost
from processes import actors, descendants, listening, output, tora_run, wait_for
from runs import read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SHORT = ["batch_size=4", "grpo_samples=4", "eval=null", "dtype=fp32"]


def test_a_killed_worker_is_replaced_and_its_groups_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    torch = ["rollout.engine=torch", "rollout.num_workers=2", "num_steps=400", "rollout.max_refills=1"]
    with tora_run(folder, *torch) as run:
        wait_for(lambda: len(read(folder)) >= 3, run)
        os.kill(actors(run.pid, "RolloutActor")[0], signal.SIGKILL)
        wait_for(lambda: read(folder)[-1]["rollout/workers"] == 1, run)
        wait_for(lambda: read(folder)[-1]["rollout/workers"] == 2, run)
        os.kill(run.pid, signal.SIGTERM)
        assert run.wait(60) == 130
    assert "is lost (ActorDiedError" in output(folder) and "is up" in output(folder)
    done = len(read(folder))
    check_history(folder, done, 4, 1)
    check_nothing_lost(folder, done)


def test_a_killed_learner_rank_resumes_from_the_last_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    torch = ["rollout.engine=torch", "learner_ranks=2", "num_steps=14", "checkpoint.every=3", "checkpoint.keep=99"]
    with tora_run(folder, *torch, "max_learner_restarts=1") as run:
        wait_for(lambda: len(read(folder)) >= 5, run)
        assert listening(actors(run.pid, "LearnerRank")) and listening(descendants(run.pid))
        os.kill(actors(run.pid, "LearnerRank")[1], signal.SIGKILL)
        assert run.wait(240) == 0
    assert "the learner is lost" in output(folder)
    check_history(folder, 14, 4, 1)
    check_nothing_lost(folder, 14)


_ODD_LOSS = """
import os, time
from dataclasses import dataclass
from pathlib import Path
from learner.loss import GRPOLoss

HERE, CALLS = Path(__file__).parent, []

def num_letters(completions, **columns):
    return [float(len(text)) for text in completions]

@dataclass(frozen=True)
class DiesAndHangsOnce(GRPOLoss):
    def __call__(self, x):
        CALLS.append(1)  # one in a step, here
        if len(CALLS) == 2 and not (HERE / "died").exists():
            (HERE / "died").touch()
            print("my last words", flush=True)
            os._exit(7)
        if len(CALLS) == 5 and not (HERE / "hung").exists():
            (HERE / "hung").touch()
            time.sleep(3600)
        return super().__call__(x)
"""


def test_a_learner_rank_that_dies_or_hangs_says_where_and_is_restarted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "odd_losses.py").write_text(_ODD_LOSS)
    words = ["rollout.engine=torch", "learner_ranks=2", "num_steps=8", "checkpoint.every=3", "learner_timeout_s=15"]
    own = [f"import_from=[{tmp_path}]", "loss._component_=odd_losses.DiesAndHangsOnce"]
    own.append("rewards=[{_component_: odd_losses.num_letters}]")
    with tora_run(folder, *words, *own) as run:
        assert run.wait(300) == 0
    logs = {file.name: file.read_text() for file in (folder / "logs").iterdir()}
    died, hung = (line for line in output(folder).splitlines() if "the learner is lost" in line)
    assert "one of its ranks died; what it printed is in" in died and f"{folder}/logs/learner_rank_" in died
    assert any("my last words" in text for name, text in logs.items() if name.endswith("_log.txt"))
    assert "made no progress for learner_timeout_s" in hung and f"{folder}/logs/learner_rank_" in hung
    assert any("odd_losses.py" in logs[f"learner_rank_{rank}.txt"] for rank in range(2))
    check_history(folder, 8, 4, 1)
    check_nothing_lost(folder, 8)


def test_a_run_out_of_learner_restarts_ends_and_can_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    torch = ["rollout.engine=torch", "checkpoint.every=2", "max_learner_restarts=0"]
    with tora_run(folder, *torch, "num_steps=400") as run:
        wait_for(lambda: len(read(folder)) >= 3, run)
        os.kill(actors(run.pid, "LearnerRank")[0], signal.SIGKILL)
        assert run.wait(120) == 1
    message = output(folder).splitlines()[-1]
    assert "max_learner_restarts=0 is used up; resume_from_checkpoint=true continues from step" in message
    step = int(message.rpartition(" ")[2].rstrip("."))
    with tora_run(folder, *torch, f"num_steps={step + 4}", "resume_from_checkpoint=true") as run:
        assert run.wait(240) == 0
    check_history(folder, step + 4, 4, 1)
    check_nothing_lost(folder, step + 4)


@pytest.mark.parametrize("engine", ["vllm", "torch"])
def test_the_quickstart_survives_a_worker_killed_every_ten_seconds(tmp_path: Path, engine: str) -> None:
    """The run ends normally, loses no group, trains none twice and keeps the staleness bound.

    Only workers that are running a group are killed: where a start takes over ten seconds, killing starting workers
    would leave none.
    """
    folder, rng, kills = tmp_path / "run", random.Random(0), 0
    whole = ["batch_size=16", "grpo_samples=16", "num_steps=60", "rollout.num_workers=2", f"rollout.engine={engine}"]
    with tora_run(folder, *whole) as run:
        wait_for(lambda: read(folder), run, 600)
        began = last = time.monotonic()
        while run.poll() is None:
            time.sleep(0.2)
            victims = actors(run.pid, "RolloutActor.run_group")
            if time.monotonic() >= last + 10 and victims and len(read(folder)) < 60:
                os.kill(rng.choice(victims), signal.SIGKILL)
                kills, last = kills + 1, time.monotonic()
            assert time.monotonic() < began + 1700
        assert run.returncode == 0
    seen = read(folder)
    check_history(folder, 60, 16, 1)
    check_nothing_lost(folder, 60, max_drops=48)
    assert kills >= 3 and seen[-1]["rollout/workers_lost"] > 0
    print(f"{kills} kills, {seen[-1]['rollout/workers_lost']:.0f} workers lost", end=", ")
    print(f"{seen[-1]['rollout/groups_rerun']:.0f} groups run again, {time.monotonic() - began:.0f} s")


def shared_memory(pids: list[int]) -> set[str]:
    """Files under /dev/shm that the processes have open or mapped."""
    found = set()
    for pid in pids:
        try:
            words = Path(f"/proc/{pid}/maps").read_text().split()
            words += [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found |= {word for word in words if word.startswith("/dev/shm/")}
    return found


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_stop_leaves_a_checkpoint_and_nothing_else(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run"
    with tora_run(folder, "num_steps=400", "rollout.num_workers=2") as run:
        wait_for(lambda: len(read(folder)) >= 3, run, 600)
        pids = descendants(run.pid)
        memory, ports = shared_memory(pids), listening(pids)
        assert len(actors(run.pid, "RolloutActor")) == 2 and ports
        if how == "Ctrl-C":
            os.killpg(run.pid, signal.SIGINT)  # to the whole process group, as a terminal does
        else:
            os.kill(run.pid, signal.SIGTERM)
        assert run.wait(180) == 130
    deadline = time.monotonic() + 10  # Ray's last processes take a moment to exit
    while alive := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    assert not [file for file in memory if Path(file).exists()]
    assert not ports & {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    done = len(read(folder))
    check_history(folder, done, 4, 1)
    check_nothing_lost(folder, done)
