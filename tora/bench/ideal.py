"""What stragglers cost at best: `python -m tora.bench.ideal`.

The steps of `tora bench async` as events on a clock of their own, with the real buffer and no overhead: as many workers
as groups in a step, one group at a time each, with lognormal durations whose mean is the seconds of a step. A new
version is installed at once. Prints how long a step takes, as a multiple of one without jitter. What a run takes beyond
that is overhead; what it cannot fall below is the schedule's.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
from dataclasses import dataclass, field
from itertools import count

from rich.console import Console
from rich.table import Table

from actors.buffer import Buffer, Slot
from tora.types import Group, Prompt

_LEARNER = None
"""The event of a step that ends, beside those of slots."""


@dataclass(slots=True)
class Schedule:
    """Time is in units of a step, which is also the mean duration of a group."""

    num_workers: int
    spare: int
    jitter: float
    """Standard deviation of the logarithm of a group's duration."""
    max_staleness: int
    parts: int
    """In which the learner takes a step at most."""
    rng: random.Random
    now: float = 0.0
    step: int = 0
    is_learning: bool = False
    running: set[Slot] = field(default_factory=set)
    events: list[tuple[float, int, Slot | None]] = field(default_factory=list)
    numbers: count[int] = field(default_factory=count)

    def time_per_step(self, num_steps: int) -> float:
        least = math.ceil(self.num_workers / self.parts)
        buffer = Buffer(self.num_workers, self.max_staleness, spare=self.spare, least=least)
        while self.step < num_steps:
            if not self.is_learning and (taken := buffer.can_take(self.step)):
                buffer.take(self.step)
                if not buffer.num_begun:
                    self.running -= set(buffer.expire(self.step)[0])
                self.is_learning = True
                self._after(taken / self.num_workers, _LEARNER)
            while len(self.running) < self.num_workers and buffer.may_grant():
                slot = buffer.grant(Prompt(next(self.numbers), (), "", {}))
                self.running.add(slot)
                self._after(math.exp(self.rng.gauss(-(self.jitter**2) / 2, self.jitter)), slot)
            self.now, _, slot = heapq.heappop(self.events)
            if slot is _LEARNER:
                self.is_learning = False
                if not buffer.num_begun:
                    self.step += 1
                    buffer.advance(self.step)
            elif slot in self.running:  # else it was aborted
                self.running.remove(slot)
                buffer.put(slot, Group(slot.prompt, ()))
        return self.now / num_steps

    def _after(self, duration: float, slot: Slot | None) -> None:
        heapq.heappush(self.events, (self.now + duration, next(self.numbers), slot))


def time_per_step(
    jitter: float, oversample: float, num_workers: int, max_staleness: int, num_steps: int, parts: int = 1
) -> float:
    spare = math.ceil(oversample * num_workers)
    return Schedule(num_workers, spare, jitter, max_staleness, parts, random.Random(0)).time_per_step(num_steps)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tora.bench.ideal", description=__doc__)
    parser.add_argument("--actors", type=int, default=16)
    parser.add_argument("--staleness", type=int, default=1)
    parser.add_argument("--parts", type=int, default=1, help="step_parts")
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args(arguments)
    if min(args.actors, args.parts, args.steps) < 1 or args.staleness < 0:
        parser.error("--actors, --parts and --steps are at least 1, and --staleness at least 0")
    shares = (0.0, 0.25, 0.5, 1.0)
    title = f"{args.actors} workers, max_staleness {args.staleness}, step_parts {args.parts}"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("jitter", justify="right")
    for share in shares:
        table.add_column(f"oversample {share:g}" if share else "wait", justify="right")
    for jitter in (0.0, 0.5, 1.0):
        times = [time_per_step(jitter, share, args.actors, args.staleness, args.steps, args.parts) for share in shares]
        table.add_row(f"{jitter:g}", *(f"{time:.2f}" for time in times))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
