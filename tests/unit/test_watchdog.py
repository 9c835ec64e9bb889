"""A watchdog in a process of its own, which it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import make_text_model

from learner.watchdog import Watchdog, size, stacks_file

_HANGS = """
import re, sys, time
from pathlib import Path
from learner.watchdog import Watchdog
dog = Watchdog(float(sys.argv[2]), Path(sys.argv[1]))
def hangs():
    re.match("(a+)+$", "a" * 60 + "b")
with dog.watching():
    for _ in range(5):
        time.sleep(0.2)
        dog.mark()
dog.mark()
time.sleep(1)
with dog.watching():
    hangs()
"""


def test_a_process_that_hangs_is_ended_and_leaves_its_stacks(tmp_path: Path) -> None:
    """Where one call in C holds the interpreter lock. Progress, and calls that are over, do not count."""
    began, stacks = time.monotonic(), tmp_path / "stacks.txt"
    done = subprocess.run([sys.executable, "-c", _HANGS, str(stacks), "0.6"], timeout=30, check=False)
    assert done.returncode == 1 and 2.6 < time.monotonic() - began < 15
    assert size(stacks) > 0 and "in hangs" in stacks.read_text()


@pytest.mark.parametrize("limit_s", [1e-9, 1e12, 1e300])
def test_any_limit_can_be_counted(limit_s: float) -> None:
    code = "from pathlib import Path; from learner.watchdog import Watchdog; import time\n"
    code += f"with Watchdog({limit_s}, Path('/dev/null/stacks')).watching(): time.sleep(0.5)"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == (limit_s < 1)
    assert ("line 2 in <module>" in done.stderr) == (limit_s < 1), "a folder that cannot be written leaves stderr"


def test_a_process_that_does_not_hang_leaves_no_stacks(tmp_path: Path) -> None:
    stacks = tmp_path / "logs/stacks.txt"
    dog = Watchdog(60, stacks)
    assert size(stacks) == 0 and not stacks.parent.exists(), "another run's folder may still be there"
    for _ in range(2):
        with dog.watching():
            dog.mark()
    assert stacks.exists() and size(stacks) == 0


_LOSS = """
import time
from dataclasses import dataclass
from learner.loss import GRPOLoss

@dataclass(frozen=True)
class SlowLoss(GRPOLoss):
    seconds: float = 0.0

    def __call__(self, x):
        time.sleep(self.seconds)
        return super().__call__(x)
"""
_RANK = """
import sys
from pathlib import Path
from learners import config, make_batch, make_groups
from learner.ray_ranks import LearnerRank

def train(seconds, capacity, limit_s=6.0):
    loss = {"_component_": "slow_losses.SlowLoss", "seconds": seconds}
    rank = LearnerRank()
    cfg = config(Path("model"), loss=loss, import_from=["own"], output_dir="run", learner_timeout_s=limit_s)
    rank.boot(cfg, VARIABLES)
    batch = make_batch(make_groups(), capacity=capacity)
    rank.step(batch)
    return len(batch.micro_batches)

VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
train(0.0, 60, 1e6)  # imports what a step needs
print(train(2.0, 60), flush=True)
train(60.0, 10_000)
"""


@pytest.mark.slow
def test_a_rank_is_ended_by_a_micro_batch_and_not_by_a_step(tmp_path: Path) -> None:
    """A step of many micro-batches may take longer than `learner_timeout_s`."""
    make_text_model(tmp_path / "model", num_layers=1)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/slow_losses.py").write_text(_LOSS)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _RANK], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1 and int(done.stdout) * 2.0 > 6, done.stderr
    assert "slow_losses.py" in stacks_file(str(tmp_path / "run"), 0).read_text()
