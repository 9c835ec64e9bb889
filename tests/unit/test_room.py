"""Which nodes a learner's ranks share, and what a run that waits for room says."""

from __future__ import annotations

import pytest

from tora.launch.room import Needs, Room, ranks_by_node, waiting

GPU = {"CPU": 1.0, "GPU": 1.0}
MARKED = {**GPU, "tora_learner": 0.001}


def node(gpus: float, cpus: float = 64.0, **more: float) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus, "node:127.0.0.1": 1.0, **more}


@pytest.mark.parametrize(
    ("count", "rank", "nodes", "expected"),
    [
        (4, GPU, [node(2), node(8), node(4)], [4]),
        (8, GPU, [node(4), node(2), node(4)], [4, 4]),
        (5, GPU, [node(4), node(3)], [4, 1]),
        (5, GPU, [node(2), node(2)], None),
        (4, GPU, [node(8, cpus=2), node(3)], [3, 1]),
        (2, {"CPU": 1.0, "GPU": 0.0}, [{"CPU": 2.0}], [2]),
        (2, MARKED, [node(8), node(2, tora_learner=1.0)], [2]),
        (2, MARKED, [node(8)], None),
        (1, GPU, [], None),
        (1, {"CPU": 1.0, "GPU": 0.25}, [node(0.25)], [1]),
    ],
)
def test_ranks_share_as_few_nodes_as_have_room_for_them(count, rank, nodes, expected) -> None:
    assert ranks_by_node(count, rank, nodes) == expected


def test_a_run_that_waits_names_what_is_missing() -> None:
    needs = Needs(ranks=2, rank=MARKED, workers=3, worker={"CPU": 2.0, "GPU": 2.0})
    assert needs.total() == pytest.approx({"CPU": 8.0, "GPU": 8.0, "tora_learner": 0.002})
    asks = (
        "the run is waiting for room in the cluster: it needs 2 x (1 CPU, 1 GPU, 0.001 tora_learner) for the learner "
        "and 3 x (2 CPU, 2 GPU) for rollout workers; "
    )
    assert waiting(needs, {"CPU": 64.0, "GPU": 5.0}) == asks + "(3 GPU, 0.002 tora_learner) missing"
    scattered = waiting(needs, node(8, tora_learner=1.0))
    assert scattered == asks + "there is as much, but not on nodes on which they fit"
    no_gpus = Needs(ranks=1, rank={"CPU": 1.0, "GPU": 0.0}, workers=1, worker={"CPU": 1.0, "GPU": 0.0})
    assert waiting(no_gpus, {}).endswith("1 x (1 CPU) for rollout workers; (2 CPU) missing")


def test_workers_beyond_the_first_find_a_place_anywhere() -> None:
    room = Room(Needs(ranks=1, rank=GPU, workers=0, worker=GPU))
    place, give_back = room.of_worker()
    give_back()
    assert place == "SPREAD" == room.of_worker()[0]
