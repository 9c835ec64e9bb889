"""Runs on several nodes, simulated by several raylets with separate object stores."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeWorker
from histories import check_history, check_nothing_lost
from processes import output, tora_run, wait_for
from runs import read

from tora.types import PolicySnapshot

pytestmark = pytest.mark.slow
SNAPSHOT_BYTES = 20 << 20
RESOURCES = {"learner": "tora_learner", "rollout a": "tora_rollout", "rollout b": "tora_rollout"}


@pytest.fixture
def cluster(nodes: Any) -> dict[str, str]:
    """A cluster with one node for learner ranks and two for rollout workers. Returns node names by node id."""
    names = {nodes.head_node.node_id: "head"} | {add(nodes, name).node_id: name for name in RESOURCES}
    nodes.wait_for_nodes()
    return names


def add(nodes: Any, name: str) -> Any:
    return nodes.add_node(num_cpus=4, resources={RESOURCES[name]: 1}, object_store_memory=200 << 20)


class Source:
    """Sends a snapshot as the first learner rank does."""

    def snapshot(self) -> PolicySnapshot:
        return PolicySnapshot(3, (), np.ones(SNAPSHOT_BYTES, np.uint8), "")


class Worker(FakeWorker):
    async def forward(self, snapshot: Any) -> Any:
        assert snapshot.data.sum() == SNAPSHOT_BYTES
        return await super().forward(snapshot)


def test_a_snapshot_reaches_each_node_once(cluster: dict[str, str]) -> None:
    import ray
    from ray._private.internal_api import memory_summary
    from ray.experimental import get_local_object_locations

    from tora.launch.ray_cluster import ray_session, role_resources

    with ray_session(0):
        source = ray.remote(Source).options(num_cpus=1, resources=role_resources("learner")).remote()
        options = {"num_cpus": 1, "resources": role_resources("rollout"), "scheduling_strategy": "SPREAD"}
        remote = ray.remote(Worker).options(**options)
        workers = [remote.remote(float, lambda prompt: [0.0]) for _ in range(4)]
        ref = source.snapshot.remote()
        ray.wait([ref], fetch_local=False)
        assert [report.version for report in ray.get([w.forward.remote(ref) for w in workers])] == [3] * 4
        (locations,) = get_local_object_locations([ref]).values()
        held_by = sorted(cluster[node] for node in locations["node_ids"])
        assert held_by == ["learner", "rollout a", "rollout b"], "put once, fetched once per node, never by the driver"
        summary = memory_summary(stats_only=True)
        assert f"Plasma memory usage {3 * SNAPSHOT_BYTES >> 20} MiB" in summary, summary


def test_a_run_keeps_ranks_and_workers_on_their_nodes(cluster: dict[str, str], tmp_path: Path) -> None:
    import ray
    from ray._private.state import actors

    from tora.config.load import load_config
    from tora.launch.launcher import run

    words = ["num_steps=2", "batch_size=4", "grpo_samples=4", "eval=null", "rollout.engine=torch"]
    words += ["learner_ranks=2", "rollout.num_workers=2", f"output_dir={tmp_path / 'run'}"]
    assert run(load_config("quickstart", words))
    assert [row["version"] for row in read(tmp_path / "run") if "version" in row] == [1, 2]
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    places = Counter((a["ActorClassName"], cluster[a["Address"]["NodeID"]]) for a in actors().values())
    assert places == {
        ("LearnerRank", "learner"): 2,
        ("RolloutActor", "rollout a"): 1,
        ("RolloutActor", "rollout b"): 1,
    }


def test_a_worker_joins_a_running_job_when_a_node_is_added(nodes: Any, tmp_path: Path) -> None:
    nodes.add_node(num_cpus=2, object_store_memory=200 << 20)
    nodes.wait_for_nodes()
    with tora_run(
        tmp_path / "run", "num_steps=400", "rollout.engine=torch", "rollout.num_workers=1", "rollout.max_workers=2"
    ) as run:
        wait_for(lambda: len(read(tmp_path / "run")) >= 3, run)
        assert {row["rollout/workers"] for row in read(tmp_path / "run")} == {1}, "a rank and a worker fill the cluster"
        nodes.add_node(num_cpus=1, object_store_memory=200 << 20)
        wait_for(lambda: read(tmp_path / "run")[-1]["rollout/workers"] == 2, run)
        run.send_signal(signal.SIGINT)
        assert run.wait(120) == 130
    seen = read(tmp_path / "run")
    check_history(tmp_path / "run", len(seen), 4, 1)
    check_nothing_lost(tmp_path / "run", len(seen))


def test_a_run_without_room_for_all_of_it_holds_none(nodes: Any, tmp_path: Path) -> None:
    """One run needs three CPUs of two. Before, its learner and one worker took them, and a run that needs two waited
    for ever; so did two runs that each had a part of the other's."""
    nodes.add_node(num_cpus=2, object_store_memory=200 << 20)
    nodes.wait_for_nodes()
    words = ["num_steps=2", "rollout.engine=torch"]
    large, small = tmp_path / "large", tmp_path / "small"
    with tora_run(large, *words, "rollout.num_workers=2") as waiting:
        wait_for(lambda: "is waiting for room in the cluster" in output(large), waiting)
        needs = "it needs 1 x (1 CPU) for the learner and 2 x (1 CPU) for rollout workers; (1 CPU) missing"
        assert needs in output(large)
        with tora_run(small, *words, "rollout.num_workers=1") as run:
            assert run.wait(240) == 0
        assert waiting.poll() is None and not read(large)
        nodes.add_node(num_cpus=1, object_store_memory=200 << 20)
        assert waiting.wait(240) == 0
    for folder in (large, small):
        check_history(folder, 2, 4, 1)


def test_a_run_begins_with_a_quorum_and_uses_the_node_that_is_late(nodes: Any, tmp_path: Path) -> None:
    for _ in range(2):
        nodes.add_node(num_cpus=1, object_store_memory=200 << 20)
    nodes.wait_for_nodes()
    folder = tmp_path / "run"
    words = ["num_steps=400", "rollout.engine=torch", "rollout.num_workers=2"]
    with tora_run(folder, *words, "rollout.min_workers=1") as run:
        wait_for(lambda: len(read(folder)) >= 3, run)
        assert {row["rollout/workers"] for row in read(folder)} == {1}
        nodes.add_node(num_cpus=1, object_store_memory=200 << 20)
        wait_for(lambda: read(folder)[-1]["rollout/workers"] == 2, run)
        run.send_signal(signal.SIGINT)
        assert run.wait(120) == 130
    seen = read(folder)
    check_history(folder, len(seen), 4, 1)
    check_nothing_lost(folder, len(seen))


def test_a_run_waits_for_the_nodes_that_it_declares(nodes: Any, tmp_path: Path) -> None:
    """Without the declaration it looks once, finds no marked node, and takes any."""
    nodes.add_node(num_cpus=4, object_store_memory=200 << 20)
    nodes.wait_for_nodes()
    folder = tmp_path / "run"
    with tora_run(folder, "num_steps=2", "rollout.engine=torch", "marked_nodes=true") as run:
        wait_for(lambda: "(0.001 tora_learner, 0.001 tora_rollout) missing" in output(folder), run)
        for name in ("learner", "rollout a"):
            add(nodes, name)
        assert run.wait(240) == 0
    check_history(folder, 2, 4, 1)


@pytest.mark.parametrize("lost", [["learner"], ["learner", "rollout a", "rollout b"]])
def test_a_run_outlives_its_nodes(nodes: Any, tmp_path: Path, lost: list[str]) -> None:
    """The learner's node takes the newest snapshot with it, and perhaps all workers go at the same time. The run waits
    for new nodes of the same kinds, and workers that were not lost stay."""
    folder, made = tmp_path / "run", {name: add(nodes, name) for name in RESOURCES}
    nodes.wait_for_nodes()
    words = ["num_steps=24", "rollout.engine=torch", "rollout.num_workers=2", "checkpoint.every=5"]
    with tora_run(folder, *words) as run:
        wait_for(lambda: len(read(folder)) >= 8, run)
        for name in lost:
            os.kill(made[name].all_processes["raylet"][0].process.pid, signal.SIGKILL)
        for name in lost:
            nodes.remove_node(made[name], allow_graceful=False)
        wait_for(lambda: "the learner is lost" in output(folder), run)
        for name in lost:
            add(nodes, name)
        assert run.wait(500) == 0
    seen = read(folder)
    assert (seen[-1]["rollout/workers_lost"] > 0) == (len(lost) > 1)
    assert "ObjectReconstruction" not in output(folder) and "state-dump" not in output(folder)
    check_history(folder, 24, 4, 1)
    check_nothing_lost(folder, 24)
