"""Bounded staleness by slots: a group that would be too old when its turn comes is never started. Pure bookkeeping.

With B groups a step and a bound of K steps, a group born under version v must be trained by step v + K, its deadline.
    A group starts only while fewer than (v + K + 1)·B have been granted, those given back excepted.
    A step takes the B finished groups of the earliest deadlines, as soon as what is left can still meet its own: for
    every later step s, at most (s - step)·B groups may be left whose deadline is s or before.
The first rule keeps the second satisfiable: when everything in flight has finished, taking in the order of deadlines
always meets it. So nothing is thrown away for its age, and no step waits for a group that may still be late.
"""

from __future__ import annotations

from dataclasses import dataclass

from tora.types import Group, Prompt


@dataclass(frozen=True, slots=True)
class Slot:
    """The right to start one group."""

    ticket: int
    prompt: Prompt
    born: int
    """Policy version when it was granted."""


class Buffer:
    def __init__(self, groups_per_step: int, max_staleness: int, *, version: int = 0) -> None:
        """`version`: where the run starts; earlier groups count as taken."""
        self._per_step, self._bound = groups_per_step, max_staleness
        self._version = version
        self._taken = version * groups_per_step
        self._next_ticket = 0
        self._in_flight: dict[int, Slot] = {}
        self._ready: list[tuple[Slot, Group]] = []

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
        slot = Slot(self._next_ticket, prompt, self._version)
        self._next_ticket += 1
        self._in_flight[slot.ticket] = slot
        return slot

    def give_back(self, slot: Slot) -> None:
        """The group is not wanted or was lost; its slot is free again."""
        del self._in_flight[slot.ticket]

    def put(self, slot: Slot, group: Group) -> None:
        del self._in_flight[slot.ticket]
        self._ready.append((slot, group))

    def can_take(self, step: int) -> bool:
        """Step `step` trains version `step`."""
        if len(self._ready) < self._per_step:
            return False
        left = [slot.born for slot, _ in self._by_deadline()[self._per_step :]]
        left += [slot.born for slot in self._in_flight.values()]
        return all(
            sum(born + self._bound <= later for born in left) <= (later - step) * self._per_step
            for later in range(step, step + self._bound + 1)
        )

    def take(self, step: int) -> list[Group]:
        """The groups of a step."""
        assert self.can_take(step), "ask can_take first"
        ordered = self._by_deadline()
        taken, self._ready = ordered[: self._per_step], ordered[self._per_step :]
        self._taken += len(taken)
        return [group for _, group in taken]

    def _by_deadline(self) -> list[tuple[Slot, Group]]:
        return sorted(self._ready, key=lambda item: (item[0].born, item[0].ticket))

    def pending(self) -> list[int]:
        """Ids of the prompts in flight or waiting: what a resumed run must generate again."""
        return sorted([s.prompt.id for s in self._in_flight.values()] + [s.prompt.id for s, _ in self._ready])

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)
