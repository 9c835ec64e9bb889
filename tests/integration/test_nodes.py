"""Runs on several nodes, simulated by several raylets with separate object stores."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeWorker
from histories import check_history, check_nothing_lost
from processes import tora_run, wait_for
from runs import read

from tora.types import PolicySnapshot

pytestmark = pytest.mark.slow
SNAPSHOT_BYTES = 20 << 20


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ray's `Cluster` with a head that has no CPUs; runs connect to it."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
    here = Path(__file__).resolve().parent
    folders = (here, here.parent / "support", here.parents[1], os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    head = {"num_cpus": 0, "object_store_memory": 200 << 20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture
def cluster(nodes: Any) -> dict[str, str]:
    """A cluster with one node for learner ranks and two for rollout workers. Returns node names by node id."""
    names = {nodes.head_node.node_id: "head"}
    for name, resource in {
        "learner": "tora_learner",
        "rollout a": "tora_rollout",
        "rollout b": "tora_rollout",
    }.items():
        node = nodes.add_node(num_cpus=4, resources={resource: 1}, object_store_memory=200 << 20)
        names[node.node_id] = name
    nodes.wait_for_nodes()
    return names


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
