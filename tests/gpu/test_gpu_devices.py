"""Which GPU a process uses, and that ranks have one each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tora.distributed.device import DRIVER, device_for, driver_version, visible_gpus
from tora.distributed.process_group import World, join

ROOT = Path(__file__).resolve().parents[2]


def test_the_driver_is_new_enough() -> None:
    version = driver_version()
    assert version is not None and int(version.split(".")[0]) >= DRIVER
    assert visible_gpus() and device_for("auto") == torch.device("cuda", 0)


def test_joining_makes_the_ranks_gpu_the_current_one() -> None:
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    join(World(), last)
    assert torch.cuda.current_device() == last.index
    join(World(), torch.device("cuda", 0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_train_on_a_gpu_each(tmp_path: Path) -> None:
    """NCCL refuses two ranks on one GPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tora"]
    run = ["run", "quickstart", "async_rl=false", "rollout.engine=torch", "num_steps=2", f"output_dir={tmp_path}/run"]
    done = subprocess.run([*command, *run], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") >= 2
