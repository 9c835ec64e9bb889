"""The seats that have room for a group, least loaded first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush

from actors.seat import Seat


class FreeSeats:
    """For as long as only its user changes the seats: it is made anew each time that groups are handed out."""

    def __init__(self, seats: Iterable[Seat]) -> None:
        self._by_version: dict[int, list[tuple[float, int, Seat]]] = {}
        """Heaps, by the policy version of the seats."""
        for seat in [seat for seat in seats if seat.up and len(seat.slots) < seat.limit]:  # of thousands, mostly few
            self._by_version.setdefault(seat.version, []).append(_entry(seat))
        for heap in self._by_version.values():
            heapify(heap)

    def add(self, seat: Seat) -> None:
        """If it is up and has room."""
        if seat.up and len(seat.slots) < seat.limit:
            heappush(self._by_version.setdefault(seat.version, []), _entry(seat))

    def find(self, may_run: Callable[[int], bool]) -> Seat | None:
        """The seat with the fewest tokens outstanding, and the lowest number among those, whose version `may_run`."""
        tops = [heap[0] for version, heap in self._by_version.items() if heap and may_run(version)]
        return min(tops)[2] if tops else None

    def remove(self, seat: Seat) -> None:
        """The seat that `find` has just returned."""
        assert heappop(self._by_version[seat.version])[2] is seat, "it is the first of its version"


def _entry(seat: Seat) -> tuple[float, int, Seat]:
    return seat.outstanding_tokens, seat.number, seat
