"""Bounded staleness by slots: a group that would be too old by the time it is trained is never started.

With B groups per step and a staleness bound of K steps, a group that a worker starts under version v must be trained by
step v + K, its deadline. Workers may have different versions, as each installs a snapshot in its own time.
    A group starts only while fewer than (v + K + 1)·B slots have been granted, not counting released ones.
    A step takes the B finished groups with the earliest deadlines, once the rest can still meet theirs: for every later
    step s, at most (s - step)·B of the remaining groups may have a deadline of s or earlier.
The first rule keeps the second satisfiable: once everything in flight has finished, taking groups in deadline order
always succeeds. So no group is discarded for its age, and no step waits for a group that a later step can still take.

With S spare slots, S more may be granted, a step takes the B finished groups with the earliest deadlines as soon as
there are B, and `expire` then drops every group whose deadline has passed. Now a slow group holds up no step. No group
is trained after its deadline either way.

Pure bookkeeping: no threads, no I/O.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from tora.config.schema import RunConfig
from tora.types import Group, Prompt


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """Permission to start one group. Compared by identity."""

    ticket: int
    prompt: Prompt
    version: int
    """That of its worker when the slot was granted; on another worker the group has this version or a newer one."""


class Buffer:
    def __init__(
        self,
        groups_per_step: int,
        max_staleness: int,
        *,
        version: int = 0,
        finished: Sequence[tuple[int, Group]] = (),
        spare: int = 0,
    ) -> None:
        """`version`: the policy version that the run starts from; all earlier steps count as taken.

        `finished`: groups of an interrupted run, each with its slot's version; all must pass `split_by_deadline`.
        """
        self._per_step, self._bound, self._spare = groups_per_step, max_staleness, spare
        self._version = version
        self._taken = version * groups_per_step
        self._tickets = count()
        self._in_flight: dict[int, Slot] = {}
        self._ready: list[tuple[Slot, Group]] = []
        """In deadline order."""
        self._untaken: Counter[int] = Counter()
        """Groups in flight or ready, by slot version. Few keys, so `can_take` is cheap."""
        for slot_version, group in finished:
            self._insert(Slot(next(self._tickets), group.prompt, slot_version), group)
            self._untaken[slot_version] += 1

    @property
    def version(self) -> int:
        return self._version

    def advance(self, version: int) -> None:
        """Call once this version is on its way to the workers."""
        assert version >= self._version, "versions never decrease"
        self._version = version

    def may_grant(self, version: int | None = None) -> bool:
        """`version`: that of the worker which would run the group; the newest if it is None."""
        version = self._version if version is None else version
        next_step = self._taken // self._per_step
        if version + self._bound < next_step:
            return False  # a spare slot, or one of an old version, would be late from the start
        granted = self._taken + len(self._in_flight) + len(self._ready)
        return granted < (version + self._bound + 1) * self._per_step + self._spare

    def grant(self, prompt: Prompt, version: int | None = None) -> Slot:
        """`version`: as for `may_grant`."""
        assert self.may_grant(version), "check may_grant first"
        slot = Slot(next(self._tickets), prompt, self._version if version is None else version)
        self._in_flight[slot.ticket] = slot
        self._untaken[slot.version] += 1
        return slot

    def release(self, slot: Slot) -> None:
        """Drop the slot's group and free the slot."""
        del self._in_flight[slot.ticket]
        self._untaken[slot.version] -= 1

    def put(self, slot: Slot, group: Group) -> None:
        del self._in_flight[slot.ticket]
        self._insert(slot, group)

    def _insert(self, slot: Slot, group: Group) -> None:
        insort(self._ready, (slot, group), key=lambda item: (item[0].version, item[0].ticket))

    def can_take(self, step: int) -> bool:
        """Whether `take(step)` may be called. Step `step` trains policy version `step`."""
        if len(self._ready) < self._per_step:
            return False
        if self._spare:
            return True
        rest = self._untaken - Counter(slot.version for slot, _ in self._ready[: self._per_step])
        return all(
            sum(number for version, number in rest.items() if version + self._bound <= later)
            <= (later - step) * self._per_step
            for later in range(step, step + self._bound + 1)
        )

    def take(self, step: int) -> list[Group]:
        """The groups that this step trains on."""
        assert self.can_take(step), "check can_take first"
        taken, self._ready = self._ready[: self._per_step], self._ready[self._per_step :]
        self._taken += len(taken)
        self._untaken -= Counter(slot.version for slot, _ in taken)
        return [group for _, group in taken]

    def expire(self, step: int) -> tuple[list[Slot], list[Slot]]:
        """Drop the groups that no step after `step` may train. Returns their slots: of those in flight, whose work is
        now useless, and of those that are finished. Both are empty without spare slots, where every group is trained.
        """
        late = [slot for slot in self._in_flight.values() if slot.version + self._bound <= step]
        for slot in late:
            self.release(slot)
        finished = [slot for slot, _ in self._ready if slot.version + self._bound <= step]
        self._ready = [item for item in self._ready if item[0].version + self._bound > step]
        self._untaken -= Counter(slot.version for slot in finished)
        return late, finished

    def in_flight(self) -> list[int]:
        """Ids of the prompts in flight, which a resumed run generates again."""
        return sorted(slot.prompt.id for slot in self._in_flight.values())

    def finished(self) -> list[tuple[int, Group]]:
        """Groups that are ready and not taken, each with its slot's version."""
        return [(slot.version, group) for slot, group in self._ready]

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)


def split_by_deadline(
    finished: Sequence[tuple[int, Group]], groups_per_step: int, max_staleness: int, version: int
) -> tuple[list[tuple[int, Group]], list[tuple[int, Group]]]:
    """Groups of a checkpoint that a run resumed at `version` can train by their deadline, and those it cannot.

    All can be trained unless the run resumes with a smaller batch or a smaller staleness bound.
    """
    usable: list[tuple[int, Group]] = []
    late: list[tuple[int, Group]] = []
    for slot_version, group in sorted(finished, key=lambda item: item[0]):
        step = version + len(usable) // groups_per_step
        (usable if step <= slot_version + max_staleness else late).append((slot_version, group))
    return usable, late


def spare_slots(cfg: RunConfig) -> int:
    """Groups that are started beyond those that steps need; see `rollout.stragglers`."""
    if cfg.rollout.stragglers == "wait":
        return 0
    return math.ceil(cfg.rollout.oversample * cfg.batch_size)
