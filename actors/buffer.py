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

A step may take its groups in parts. Until it has all of them, what it has taken counts as finished and not trained, and
the second rule is about the groups that it has yet to take.

Pure bookkeeping: no threads, no I/O.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from tora.config.parts import step_parts
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
        least: int | None = None,
    ) -> None:
        """`version`: the policy version that the run starts from; all earlier steps count as taken.

        `finished`: groups of an interrupted run, each with its slot's version; all must pass `split_by_deadline`.
        `least`: groups that a step takes at least at a time; None for all.
        """
        self._per_step, self._bound, self._spare = groups_per_step, max_staleness, spare
        self._least = groups_per_step if least is None else least
        self._version = version
        self._begun: list[tuple[Slot, Group]] = []
        """Groups of a step that has not taken all of them."""
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

    @property
    def num_begun(self) -> int:
        """Groups that the present step has, if it has not all of them."""
        return len(self._begun)

    @property
    def _wanted(self) -> int:
        return self._per_step - len(self._begun)

    def can_take(self, step: int) -> int:
        """How many groups `take(step)` would take: as many as leave the others room to meet their deadlines, 0 if those
        are fewer than `least` and not all that the step still wants. Step `step` trains policy version `step`."""
        most = min(len(self._ready), self._wanted)
        for later in range(step, step + self._bound + 1) if not self._spare else ():
            due = later - self._bound  # the newest version whose groups no step after `later` may train
            room = (later - step) * self._per_step + self._wanted
            untaken = sum(number for version, number in self._untaken.items() if version <= due)
            ready = bisect_right(self._ready, due, key=lambda item: item[0].version)
            most = min(most, ready + room - untaken)
        return most if most >= min(self._least, self._wanted) else 0

    def take(self, step: int) -> list[Group]:
        """All groups that the step has now, which are those that it trains on once `num_begun` is 0 again."""
        number = self.can_take(step)
        assert number, "check can_take first"
        taken, self._ready = self._ready[:number], self._ready[number:]
        self._taken += number
        self._untaken -= Counter(slot.version for slot, _ in taken)
        so_far = [*self._begun, *taken]
        self._begun = so_far if len(so_far) < self._per_step else []
        return [group for _, group in so_far]

    def expire(self, step: int) -> tuple[list[Slot], list[Slot]]:
        """Drop the groups that no step after `step`, which has taken all of its own, may train. Returns their slots: of
        those in flight, whose work is now useless, and of those that are finished. Both are empty without spare slots,
        where every group is trained.
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
        """Groups that no step has trained on, each with its slot's version: those that are ready, and those of a step
        that has not taken all of its own."""
        return [(slot.version, group) for slot, group in (*self._begun, *self._ready)]

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


def buffer_of(cfg: RunConfig, version: int, finished: Sequence[tuple[int, Group]]) -> tuple[Buffer, list[Group]]:
    """The buffer of a run that starts at `version` with `finished` groups, and those of them that are too late."""
    usable, late = split_by_deadline(finished, cfg.batch_size, cfg.max_staleness, version)
    spare, least = spare_slots(cfg), math.ceil(cfg.batch_size / step_parts(cfg))
    buffer = Buffer(cfg.batch_size, cfg.max_staleness, version=version, finished=usable, spare=spare, least=least)
    return buffer, [group for _, group in late]


def spare_slots(cfg: RunConfig) -> int:
    """Groups that are started beyond those that steps need; see `rollout.stragglers`."""
    if cfg.rollout.stragglers == "wait":
        return 0
    return math.ceil(cfg.rollout.oversample * cfg.batch_size)
