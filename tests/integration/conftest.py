"""Fixtures of several integration tests."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import RankProcesses


@pytest.fixture(scope="module")
def on_ranks() -> Iterator[RankProcesses]:
    ranks = RankProcesses()
    yield ranks
    ranks.close()


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
