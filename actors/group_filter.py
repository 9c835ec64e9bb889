"""Which groups are trained on: those with a signal. Too many failed rollouts end the run."""

from __future__ import annotations

import logging
import re
from collections import defaultdict, deque
from collections.abc import Iterable

from tora.batching.signal import has_signal, max_refills
from tora.config.schema import RunConfig
from tora.errors import RolloutError
from tora.types import Group, Prompt

_SHOWN = 80
"""Characters of a prompt in a warning."""
_MOST_KINDS = 10
"""Kinds of failures of one reward that are named; further ones are only counted."""
_log = logging.getLogger(__name__)


class SignalFilter:
    """Drops groups without a signal, up to a limit per step, and records every group generated.

    A group left with fewer than two rollouts is always dropped and does not count towards the limit.
    """

    def __init__(self, cfg: RunConfig) -> None:
        self._cfg = cfg
        self._max_drops = max_refills(cfg)
        self._failed = FailedRollouts(cfg.max_failed_rewards, window=cfg.batch_size)
        self._drops = 0
        self._generated: list[Group] = []

    def admit(self, group: Group) -> bool:
        """Whether the group is trained on. Raises RolloutError if too many rollouts have failed."""
        self._generated.append(group)
        show_printed([group])
        self._failed.add(group)
        if len(group.rollouts) < 2:
            return False
        if has_signal(group, self._cfg) or self._drops >= self._max_drops:
            return True
        self._drops += 1
        return False

    def drain(self) -> tuple[list[Group], int]:
        """Groups generated since the last call, and how many of them were dropped because their rewards were equal."""
        generated, drops = self._generated, self._drops
        self._generated, self._drops = [], 0
        return generated, drops


def show_printed(groups: Iterable[Group]) -> None:
    """What reward functions printed where the user does not see it."""
    for group in groups:
        for line in group.printed:
            print(line)


def shown(prompt: Prompt) -> str:
    """The end of the prompt's last message, enough to recognise it."""
    content = prompt.source if isinstance(prompt.source, str) else prompt.source[-1].get("content") or ""
    text = content if isinstance(content, str) else " ".join(str(part.get("text", "<image>")) for part in content)
    return text if len(text) <= _SHOWN else f"...{text[-_SHOWN:]}"


class FailedRollouts:
    """Those whose reward failed, and those with a log-prob that is not finite."""

    def __init__(self, max_share: float, window: int) -> None:
        """`window`: the number of most recent groups to average over. A window that is not yet full never raises."""
        self._max_share = max_share
        self._window = window
        self._recent: deque[tuple[int, int]] = deque()
        """Of each group the rollouts that failed, and all."""
        self._failed = self._total = 0
        """Their sums."""
        self._warned: dict[str | None, set[str]] = defaultdict(set)
        """Reasons without their numbers, by the name of the reward, and of the engine under None."""

    def add(self, group: Group) -> None:
        """Raises RolloutError if more than `max_share` of the recent rollouts have failed."""
        self._count(len(group.failures) + len(group.bad_logprobs), group.num_left_out + len(group.rollouts))
        for bad in group.bad_logprobs:
            self._last = f"the engine's log-prob of token {bad.index} is {bad.value} under policy version {bad.version}"
            if self._is_new(None, ""):
                _log.warning("%s, for a rollout of prompt %d, which is left out", self._last, group.prompt.id)
        for failure in group.failures:
            self._last = f"reward {failure.name} {failure.reason}{failure.place}"
            if self._is_new(failure.name, failure.reason):
                scores = "" if failure.parts is None else f", and scores {failure.parts.get(failure.name, 0.0):g}"
                prompt = f"{group.prompt.id} ({shown(group.prompt)!r})"
                _log.warning("%s, for a rollout of prompt %s%s", self._last, prompt, scores)
        if len(self._recent) == self._window and self._failed > self._max_share * self._total:
            raise RolloutError(
                f"{self._failed} of the last {self._total} rollouts failed, more than "
                f"max_failed_rewards={self._max_share:g}; the last: {self._last}"
            )

    def _count(self, failed: int, total: int) -> None:
        self._recent.append((failed, total))
        if len(self._recent) > self._window:
            old_failed, old_total = self._recent.popleft()
            failed, total = failed - old_failed, total - old_total
        self._failed += failed
        self._total += total

    def _is_new(self, name: str | None, reason: str) -> bool:
        kind, known = re.sub(r"\d+", "", reason), self._warned[name]
        if kind in known or len(known) == _MOST_KINDS:
            return False
        known.add(kind)
        return True
