"""How many groups a worker gets at once."""

from __future__ import annotations

from fakes import FakeWorker, make_snapshot
from pools import (
    QUICK,
    config,
    next_batch,
    running,
)

from actors.concurrency import next_limit
from tora.protocols import Occupancy
from tora.types import GroupResult, Prompt


def test_concurrency_follows_the_kv_cache() -> None:
    assert next_limit(8, 16, 8, Occupancy(0.5)) == 9
    assert next_limit(16, 16, 16, Occupancy(0.5)) == 16
    assert next_limit(8, 16, 3, Occupancy(0.5)) == 8, "nothing waits for a higher limit"
    assert next_limit(8, 16, 8, Occupancy(0.9)) == 8
    assert next_limit(8, 16, 8, Occupancy(0.99)) == 6
    assert next_limit(8, 16, 4, Occupancy(0.5, preemptions=2)) == 3
    assert next_limit(1, 16, 1, Occupancy(1.0, preemptions=9)) == 1


def test_a_full_cache_gets_fewer_groups() -> None:
    class Small(FakeWorker):
        """Room for 3 groups."""

        running = 0
        overflows: list[bool]

        async def run_group(self, prompt: Prompt) -> GroupResult:
            self.running += 1
            self.overflows.append(self.running > 3)
            try:
                return await super().run_group(prompt)
            finally:
                self.running -= 1

        async def occupancy(self) -> Occupancy:
            return Occupancy(min(1.0, self.running / 3), max(0, self.running - 3))

    worker = Small(lambda: 0.03)
    worker.overflows = []
    with running(config(1, workers=1, concurrency=16, batch_size=16), lambda: worker, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        for step in range(6):
            next_batch(rollouts, step)
            rollouts.publish(make_snapshot(step + 1))
    early, late = worker.overflows[:16], worker.overflows[-32:]
    assert sum(early) > 8 and sum(late) < 12
