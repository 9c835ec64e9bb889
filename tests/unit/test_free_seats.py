"""Which seat gets the next group, against a search over all seats."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fakes import make_prompt, make_snapshot

from actors.buffer import Slot
from actors.free_seats import FreeSeats
from actors.seat import Seat, SeatTiming
from tora.config.schema import RolloutConfig


def made_seats(rng: random.Random) -> list[Seat]:
    nobody: Any = None
    seats = []
    for number in range(rng.randint(0, 12)):
        seat = Seat(
            nobody, nobody, RolloutConfig(concurrency=rng.randint(1, 4)), number, events=nobody, timing=SeatTiming()
        )
        seat.up, seat.installed = rng.random() < 0.8, make_snapshot(rng.randint(0, 2))
        for ticket in range(rng.randint(0, 4)):
            seat.reserve(Slot(ticket, make_prompt(ticket), 0), rng.choice([10.0, 20.0]))
        seats.append(seat)
    return seats


@pytest.mark.parametrize("seed", range(50))
def test_groups_go_to_the_least_loaded_seat_that_may_run_them(seed: int) -> None:
    rng = random.Random(seed)
    seats = made_seats(rng)
    free = FreeSeats(seats)
    for ticket in range(40):
        oldest = rng.randint(0, 2)
        able = [s for s in seats if s.up and len(s.slots) < s.limit and s.version >= oldest]
        wanted = min(able, key=lambda seat: seat.outstanding_tokens) if able else None
        found = free.find(lambda version, oldest=oldest: version >= oldest)
        assert found is wanted
        if found is not None and rng.random() < 0.8:  # sometimes no prompt is made yet
            free.remove(found)
            found.reserve(Slot(100 + ticket, make_prompt(ticket), found.version), rng.choice([5.0, 10.0]))
            free.add(found)
