"""Room in a Ray cluster for all that a run needs to begin, or for nothing.

One placement group holds the learner's ranks and the workers that the first step waits for. Ray grants it as a whole,
so a run that finds no room holds nothing that another run could use, and two runs cannot each wait for what the other
has. The group stays for the life of the run: what is lost starts again in its place, or where Ray moves that place if
its node is lost. Workers beyond the first ask for room one by one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_PATIENCE_S = 5.0
"""For room that the cluster seems to have."""
_WARN_AFTER_S = 10.0
_WARN_EVERY_S = 60.0
_log = logging.getLogger(__name__)

Resources = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run asks of the cluster."""

    ranks: int
    rank: Resources
    """Of each of them, by Ray's names."""
    workers: int
    """Those that the first step waits for."""
    worker: Resources

    def total(self) -> dict[str, float]:
        names = dict.fromkeys([*self.rank, *self.worker])
        return {
            name: self.ranks * self.rank.get(name, 0.0) + self.workers * self.worker.get(name, 0.0) for name in names
        }


class Room:
    def __init__(self, needs: Needs) -> None:
        """Asks for nothing yet; see `wait`."""
        self._needs = needs
        self._group: Any = None
        self._bundle_of_rank: list[int] = []
        self._free: list[int] = []
        """Bundles of workers that no worker has."""

    def wait(self) -> None:
        """Returns once the cluster has granted room for all of it, perhaps long ago. Says what is missing while it
        waits, for which there is no limit: nodes may be on their way."""
        if self._group is not None:
            return
        needs = self._needs
        together = ranks_by_node(needs.ranks, needs.rank, _free_by_node()) if needs.ranks > 1 else None
        if together is not None:
            if self._ask(together, "SPREAD").wait(_PATIENCE_S):
                return
            self.give_up()
        group, patience_s = self._ask([1] * needs.ranks, "SPREAD" if needs.ranks == 1 else "PACK"), _WARN_AFTER_S
        while not group.wait(patience_s):
            _log.warning("%s", waiting(needs, _available()))
            patience_s = _WARN_EVERY_S

    def _ask(self, ranks: Sequence[int], strategy: str) -> Any:
        """Ask for a bundle for each of these numbers of ranks and for each worker."""
        from ray.util.placement_group import placement_group

        needs = self._needs
        bundles = [{name: count * each for name, each in needs.rank.items()} for count in ranks]
        bundles += [dict(needs.worker)] * needs.workers
        self._bundle_of_rank = [index for index, count in enumerate(ranks) for _ in range(count)]
        self._free = [*range(len(ranks), len(bundles))]
        self._group = placement_group(bundles, strategy=strategy)
        return self._group

    def give_up(self) -> None:
        """Give back what was granted, which ends what runs there."""
        from ray.util.placement_group import remove_placement_group

        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def of_ranks(self) -> list[Any]:
        """Ray's scheduling strategy of each rank."""
        return [self._of_bundle(index) for index in self._bundle_of_rank]

    def of_worker(self) -> tuple[Any, Callable[[], None]]:
        """Ray's scheduling strategy of one more worker, and what to call when it has ended: one of the run's own places
        if one is free, else wherever there is room."""
        if not self._free:
            return "SPREAD", lambda: None
        index = self._free.pop(0)
        return self._of_bundle(index), lambda: self._free.append(index)

    def _of_bundle(self, index: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._group, index)


def ranks_by_node(count: int, rank: Resources, nodes: Iterable[Resources]) -> list[int] | None:
    """How many of `count` ranks go to each of the fewest nodes that have room for them; None if there are none such.

    `nodes`: what is free on each.
    """
    room = sorted((_times(rank, free) for free in nodes), reverse=True)
    result: list[int] = []
    for number in room:
        if (taken := min(number, count - sum(result))) > 0:
            result.append(taken)
    return result if sum(result) == count else None


def _times(each: Resources, free: Resources) -> int:
    """How often `each` fits into what is free."""
    return min(math.floor(free.get(name, 0.0) / need + 1e-6) for name, need in each.items() if need > 0)


def waiting(needs: Needs, free: Resources) -> str:
    """`free`: in the whole cluster."""
    lacks = {name: need - free.get(name, 0.0) for name, need in needs.total().items()}
    lacks = {name: number for name, number in lacks.items() if number > 1e-6}
    reason = f"{_said(lacks)} missing" if lacks else "there is as much, but not on nodes on which they fit"
    return (
        f"the run is waiting for room in the cluster: it needs {needs.ranks} x {_said(needs.rank)} for the learner and "
        f"{needs.workers} x {_said(needs.worker)} for rollout workers; {reason}"
    )


def _said(resources: Resources) -> str:
    return "(" + ", ".join(f"{number:g} {name}" for name, number in resources.items() if number > 0) + ")"


def _available() -> dict[str, float]:
    import ray

    return dict(ray.available_resources())


def _free_by_node() -> list[Resources]:
    from ray._private.state import available_resources_per_node

    return list(available_resources_per_node().values())
