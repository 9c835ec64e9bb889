"""Processes that live and answer nothing, as under SIGSTOP, and calls that never return, with real Ray."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from histories import check_history, check_nothing_lost
from processes import actors, children, output, tora_run, wait_for
from runs import read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TORCH = ["rollout.engine=torch", "grpo_samples=4", "checkpoint.every=1", "checkpoint.keep=99"]


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_stopped_process_of_any_role_is_noticed_and_replaced(tmp_path: Path) -> None:
    """In one run, one role after the other: each victim is gone, and the run has trained ten more steps."""
    folder = tmp_path / "run"
    words = [*TORCH, "async_rl=true", "rollout.num_workers=2", "num_steps=4000", "max_idle_steps=0"]
    words += [
        "prompt_process=true",
        "rollout.heartbeat_s=10",
        "learner_timeout_s=30",
        "reward_timeout_s=3",
        "environment_timeout_s=3",
    ]
    roles = {
        "reward process": lambda pid: children(pid, "tora.rewards.processes"),
        "environment process": lambda pid: children(pid, "tora.environments.host"),
        "prompt process": lambda pid: actors(pid, "PromptActor"),
        "worker": lambda pid: actors(pid, "RolloutActor"),
        "rank": lambda pid: actors(pid, "LearnerRank"),
    }
    with tora_run(folder, *words, config="quickstart_tools") as run:
        wait_for(lambda: len(read(folder)) >= 3, run)
        for role, found in roles.items():
            victim = found(run.pid)[0]
            os.kill(victim, signal.SIGSTOP)
            print("stopped:", role, flush=True)
            wait_for(lambda victim=victim: has_ended(victim), run)
            done = read(folder)[-1]["step"]
            wait_for(lambda done=done: read(folder)[-1]["step"] >= done + 10, run)
        os.kill(run.pid, signal.SIGTERM)
        assert run.wait(60) == 130
    assert "is lost (it did not answer within 10 s" in output(folder)
    assert "the process that makes prompts has not answered within rollout.heartbeat_s=10 s" in output(folder)
    assert "the learner is lost: rank 0 has answered nothing for learner_timeout_s=30" in output(folder)
    done = len(read(folder))
    check_history(folder, done, 4, 1)
    check_nothing_lost(folder, done, max_drops=99)


_ODD_SCHEDULE = """
import time
from pathlib import Path
import torch

HERE = Path(__file__).parent

def hangs_once(where):
    if not (HERE / where).exists():
        (HERE / where).touch()
        time.sleep(3600)

class HangsOnce(torch.optim.lr_scheduler.ConstantLR):
    def __init__(self, optimizer):
        super().__init__(optimizer, total_iters=0)

    def state_dict(self):
        hangs_once("saving")
        return super().state_dict()

    def load_state_dict(self, state):
        hangs_once("restoring")
        return super().load_state_dict(state)
"""


def test_a_rank_that_hangs_while_it_saves_or_restores_is_restarted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "odd_schedules.py").write_text(_ODD_SCHEDULE)
    own = [f"import_from=[{tmp_path}]", "lr_scheduler._component_=odd_schedules.HangsOnce", "learner_timeout_s=20"]
    with tora_run(folder, *TORCH, *own, "num_steps=30", "max_learner_restarts=2") as run:
        wait_for(lambda: (tmp_path / "saving").exists(), run)
        wait_for(lambda: len(read(folder)) >= 12, run)
        os.kill(actors(run.pid, "LearnerRank")[0], signal.SIGKILL)
        assert run.wait(300) == 0
    lost = [line for line in output(folder).splitlines() if "the learner is lost" in line]
    assert ["no progress" in line for line in lost] == [True, False, True]
    stacks = (folder / "logs/learner_rank_0.txt").read_text()
    assert "in state_dict" in stacks and "in load_state_dict" in stacks
    check_history(folder, 30, 4, 1)
    check_nothing_lost(folder, 30)


_STUCK_SCHEDULE = """
import os
from pathlib import Path
import torch

HERE = Path(__file__).parent

class StuckAtSomeSteps(torch.optim.lr_scheduler.ConstantLR):
    \"\"\"Puts a pipe that nobody reads in the place of a file of two checkpoints, once each.\"\"\"

    def __init__(self, optimizer):
        super().__init__(optimizer, total_iters=0)

    def state_dict(self):
        for folder in HERE.glob("run/checkpoints/.step_*"):
            if folder.name in (".step_000002", ".step_000009") and not (HERE / folder.name).exists():
                (HERE / folder.name).touch()
                os.mkfifo(folder / "learner.json")
        return super().state_dict()
"""


def test_a_checkpoint_whose_write_never_ends_costs_itself(tmp_path: Path) -> None:
    """As to a file server that is gone, in the middle of a run and at its end, where no step follows."""
    folder = tmp_path / "run"
    (tmp_path / "stuck_schedules.py").write_text(_STUCK_SCHEDULE)
    own = [f"import_from=[{tmp_path}]", "lr_scheduler._component_=stuck_schedules.StuckAtSomeSteps"]
    with tora_run(folder, *TORCH, *own, "learner_timeout_s=15", "num_steps=9", "max_learner_restarts=1") as run:
        assert run.wait(300) == 0
    lost = [line for line in output(folder).splitlines() if "the learner is lost" in line]
    assert ["it wrote a checkpoint for learner_timeout_s=15" in line for line in lost] == [True, True], lost
    assert ["restarting it from step 1" in lost[0], "restarting it from step 8" in lost[1]] == [True, True], lost
    assert sorted(f.name for f in (folder / "checkpoints").iterdir()) == [f"step_{n:06d}" for n in range(1, 10)]
    check_history(folder, 9, 4, 1)
    check_nothing_lost(folder, 9)
