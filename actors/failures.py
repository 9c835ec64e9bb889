"""Rollouts whose reward failed: counted, told once, and too many of them end the run."""

from __future__ import annotations

import logging
from collections import deque

from tora.errors import RolloutError
from tora.types import Group

_log = logging.getLogger(__name__)


class FailedRewards:
    def __init__(self, max_share: float, window: int) -> None:
        """`window`: groups over which the share is taken; before there are so many, nothing ends."""
        self._max_share = max_share
        self._recent: deque[tuple[int, int]] = deque(maxlen=window)
        self._told: set[str] = set()

    def add(self, group: Group) -> None:
        """Errors: RolloutError once more than `max_share` of the recent rollouts failed."""
        self._recent.append((len(group.failures), len(group.failures) + len(group.rollouts)))
        for failure in group.failures:
            self._last = failure
            if failure.name not in self._told:
                self._told.add(failure.name)
                _log.warning("reward %s %s, for a rollout of prompt %d", failure.name, failure.reason, group.prompt.id)
        failed, total = (sum(column) for column in zip(*self._recent, strict=True))
        if len(self._recent) == self._recent.maxlen and failed > self._max_share * total:
            raise RolloutError(
                f"rewards failed for {failed} of the last {total} rollouts, more than "
                f"max_failed_rewards={self._max_share:g}; the last: {self._last.name} {self._last.reason}"
            )
