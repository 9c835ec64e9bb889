"""How many groups a worker is given at once: additive increase, multiplicative decrease, by its engine's KV cache.

An engine that runs out of cache throws sequences out and computes them again later: work done twice, and no group
sooner. One that has room to spare batches more. The bound follows what fits, as long as prompts and completions grow.
"""

from __future__ import annotations

from tora.types import Occupancy

_FULL, _SPARE = 0.95, 0.80
"""Shares of the KV cache: above the first the bound falls, below the second it may rise."""


def adapted(limit: int, most: int, in_flight: int, load: Occupancy) -> int:
    """The next bound on groups in flight, from 1 to `most`.

    It rises only while it is what holds groups back, so that an idle worker's bound does not drift up untested.
    """
    if load.preemptions > 0 or load.kv_usage > _FULL:
        return max(1, min(limit, in_flight) * 3 // 4)
    if load.kv_usage < _SPARE and in_flight >= limit:
        return min(most, limit + 1)
    return limit
