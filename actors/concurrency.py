"""How many groups a worker gets at once: additive increase, multiplicative decrease, driven by its engine's KV cache.

An engine that runs out of cache preempts sequences and recomputes them later, which costs work without finishing any
group sooner. An engine with cache to spare can batch more. The limit follows what fits as prompts and completions grow.
"""

from __future__ import annotations

from tora.protocols import Occupancy

_HIGH, _LOW = 0.95, 0.80
"""Shares of the KV cache: the limit falls above the first and may rise below the second."""


def next_limit(limit: int, max_limit: int, in_flight: int, occupancy: Occupancy) -> int:
    """The new limit on groups in flight, from 1 to `max_limit`.

    Rises only while the limit is what holds groups back, so that an idle worker's limit does not drift up untested.
    """
    if occupancy.preemptions > 0 or occupancy.kv_usage > _HIGH:
        return max(1, min(limit, in_flight) * 3 // 4)
    if occupancy.kv_usage < _LOW and in_flight >= limit:
        return min(max_limit, limit + 1)
    return limit
