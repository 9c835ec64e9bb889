"""Which groups are trained on: those with a signal, while not too many of their rewards fail."""

from __future__ import annotations

import logging
from collections import deque

from tora.config.schema import RunConfig
from tora.errors import RolloutError
from tora.types import Group

_log = logging.getLogger(__name__)


class SignalFilter:
    """Drops groups whose rewards are all equal, up to a number a step, and remembers all that were generated.

    A group that failed rewards left with fewer than two rollouts is dropped in any case.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self._max_drops = int(cfg.rollout.max_refills * cfg.batch_size)
        self._failed = FailedRewards(cfg.max_failed_rewards, window=cfg.batch_size)
        self._drops = 0
        self._seen: list[Group] = []

    def keeps(self, group: Group) -> bool:
        """Errors: RolloutError where too many rewards fail."""
        self._seen.append(group)
        self._failed.add(group)
        if len(group.rollouts) < 2:
            return False
        if group.has_signal or self._drops >= self._max_drops:
            return True
        self._drops += 1
        return False

    def take(self) -> tuple[list[Group], int]:
        """Groups generated and groups dropped since the last call."""
        seen, drops = self._seen, self._drops
        self._seen, self._drops = [], 0
        return seen, drops


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
