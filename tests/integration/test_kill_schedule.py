"""`kill -9` of every role of a run in turn, on three nodes, every ten seconds."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from histories import check_history, check_nothing_lost
from processes import actors, children, tora_run, wait_for
from runs import read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NUM_STEPS, EVERY_S = 60, 10.0
ROLES = [
    "worker with its engine",
    "learner rank",
    "prompt process",
    "reward process",
    "environment process",
    "raylet of three",
]


class Nodes:
    """Three nodes, on any of which a rank or a worker may be."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._nodes = [self._add() for _ in range(3)]
        cluster.wait_for_nodes()

    def _add(self) -> Any:
        for _ in range(4):  # Ray gives a node 30 s to start, which a busy machine may not keep
            with suppress(Exception):
                return self._cluster.add_node(num_cpus=2, object_store_memory=200 << 20)
        raise AssertionError("no node starts here")

    def raylets(self) -> list[int]:
        return [node.all_processes["raylet"][0].process.pid for node in self._nodes]

    def replace(self, raylet: int) -> None:
        """As the cluster's own supervisor would: the rest of a killed node goes, and another comes."""
        number = self.raylets().index(raylet)
        self._cluster.remove_node(self._nodes[number], allow_graceful=False)
        self._nodes[number] = self._add()


def test_a_run_survives_kill_9_of_every_role(nodes: Any, tmp_path: Path) -> None:
    """The run ends with 0 after the same number of steps; no group is lost and none is trained twice.

    Between two kills a step is trained: where a process takes longer than ten seconds to start, as on a busy machine,
    none would ever be.
    """
    folder, rng, kills, three = tmp_path / "run", random.Random(0), Counter[str](), Nodes(nodes)
    words = ["async_rl=true", "rollout.engine=torch", "rollout.num_workers=2", f"num_steps={NUM_STEPS}"]
    words += [
        "batch_size=8",
        "grpo_samples=4",
        "checkpoint.every=1",
        "checkpoint.keep=999",
        "max_idle_steps=0",
        "step_parts=4",
        "prompt_process=true",
    ]
    here, order = os.getpid(), list[str]()  # the nodes' processes are this one's, as is the run
    with tora_run(folder, *words, config="quickstart_tools") as run:
        wait_for(lambda: read(folder), run, 600)
        began, trained = (last := time.monotonic()), 0
        while run.poll() is None:
            time.sleep(0.2)
            assert time.monotonic() < began + 1700
            done = len(read(folder))
            if time.monotonic() < last + EVERY_S or done >= NUM_STEPS or done <= trained:
                continue
            order = order or rng.sample(ROLES, len(ROLES))
            victims = {
                "worker with its engine": lambda: actors(here, "RolloutActor"),
                "learner rank": lambda: actors(here, "LearnerRank"),
                "prompt process": lambda: actors(here, "PromptActor"),
                "reward process": lambda: children(here, "tora.rewards.processes"),
                "environment process": lambda: children(here, "tora.environments.host"),
                "raylet of three": three.raylets,
            }[order[0]]()
            if not victims:
                continue  # it is being replaced
            role, victim, last, trained = order.pop(0), rng.choice(victims), time.monotonic(), done
            os.kill(victim, signal.SIGKILL)
            kills[role] += 1
            print(f"{last - began:.0f} s, {done} steps: {role}", flush=True)
            if role == "raylet of three":
                three.replace(victim)
        assert run.returncode == 0
    seen = read(folder)
    check_history(folder, NUM_STEPS, 8, 1)
    check_nothing_lost(folder, NUM_STEPS, max_drops=48)
    assert all(kills[role] >= 1 for role in ROLES), kills
    print(f"{sum(kills.values())} kills in {time.monotonic() - began:.0f} s: {dict(kills)}")
    print(
        f"{seen[-1]['rollout/workers_lost']:.0f} workers lost, {seen[-1]['rollout/groups_rerun']:.0f} groups run again"
    )
