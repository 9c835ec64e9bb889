"""Bounded staleness by slots: a group that would be too old when its turn comes is never started. Pure bookkeeping.

With B groups a step and a bound of K steps, a group born under version v must be trained by step v + K, its deadline.
    A group starts only while fewer than (v + K + 1)·B have been granted, those given back excepted.
    A step takes the B finished groups of the earliest deadlines, as soon as what is left can still meet its own: for
    every later step s, at most (s - step)·B groups may be left whose deadline is s or before.
The first rule keeps the second satisfiable: when everything in flight has finished, taking in the order of deadlines
always meets it. So nothing is thrown away for its age, and no step waits for a group that may still be late.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from tora.types import Group, Prompt


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """The right to start one group; itself alone."""

    ticket: int
    prompt: Prompt
    born: int
    """Policy version when it was granted."""


class Buffer:
    def __init__(
        self, groups_per_step: int, max_staleness: int, *, version: int = 0, finished: Sequence[tuple[int, Group]] = ()
    ) -> None:
        """`version`: where the run starts; earlier groups count as taken.

        `finished`: groups of an interrupted run, each with the version it was born under; see `in_time` for which of
        them may be given.
        """
        self._per_step, self._bound = groups_per_step, max_staleness
        self._version = version
        self._taken = version * groups_per_step
        self._tickets = count()
        self._in_flight: dict[int, Slot] = {}
        self._ready: list[tuple[Slot, Group]] = []
        """In the order of their deadlines."""
        self._owed: Counter[int] = Counter()
        """Groups in flight or ready, by the version they were born under; so few keys that asking is cheap."""
        for born, group in finished:
            self._enter(Slot(next(self._tickets), group.prompt, born), group)
            self._owed[born] += 1

    @property
    def version(self) -> int:
        return self._version

    def advance(self, version: int) -> None:
        """The workers serve this version now."""
        assert version >= self._version, "versions only grow"
        self._version = version

    def may_grant(self) -> bool:
        granted = self._taken + len(self._in_flight) + len(self._ready)
        return granted < (self._version + self._bound + 1) * self._per_step

    def grant(self, prompt: Prompt) -> Slot:
        assert self.may_grant(), "ask may_grant first"
        slot = Slot(next(self._tickets), prompt, self._version)
        self._in_flight[slot.ticket] = slot
        self._owed[slot.born] += 1
        return slot

    def give_back(self, slot: Slot) -> None:
        """The group is not wanted; its slot is free again."""
        del self._in_flight[slot.ticket]
        self._owed[slot.born] -= 1

    def put(self, slot: Slot, group: Group) -> None:
        del self._in_flight[slot.ticket]
        self._enter(slot, group)

    def _enter(self, slot: Slot, group: Group) -> None:
        insort(self._ready, (slot, group), key=lambda item: (item[0].born, item[0].ticket))

    def can_take(self, step: int) -> bool:
        """Step `step` trains version `step`."""
        if len(self._ready) < self._per_step:
            return False
        left = self._owed - Counter(slot.born for slot, _ in self._ready[: self._per_step])
        return all(
            sum(number for born, number in left.items() if born + self._bound <= later)
            <= (later - step) * self._per_step
            for later in range(step, step + self._bound + 1)
        )

    def take(self, step: int) -> list[Group]:
        """The groups of a step."""
        assert self.can_take(step), "ask can_take first"
        taken, self._ready = self._ready[: self._per_step], self._ready[self._per_step :]
        self._taken += len(taken)
        self._owed -= Counter(slot.born for slot, _ in taken)
        return [group for _, group in taken]

    def in_flight(self) -> list[int]:
        """Ids of the prompts that are being answered: what a resumed run must generate again."""
        return sorted(slot.prompt.id for slot in self._in_flight.values())

    def finished(self) -> list[tuple[int, Group]]:
        """Groups that wait for their step, each with the version it was born under."""
        return [(slot.born, group) for slot, group in self._ready]

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)


def in_time(
    finished: Sequence[tuple[int, Group]], groups_per_step: int, max_staleness: int, version: int
) -> tuple[list[tuple[int, Group]], list[tuple[int, Group]]]:
    """Which groups of a checkpoint a run that goes on from `version` may train, and which come too late.

    All are in time unless the run goes on with a smaller batch or a smaller bound than it was interrupted with.
    """
    good: list[tuple[int, Group]] = []
    late: list[tuple[int, Group]] = []
    for born, group in sorted(finished, key=lambda item: item[0]):
        step = version + len(good) // groups_per_step
        (good if step <= born + max_staleness else late).append((born, group))
    return good, late
