"""Proof that the engines serve the policy that the learner holds: both are asked for log-probs of the same tokens.

The digest of a sync says that the tensors lie where the engine's names say they belong. That those names are right, the
scaling too, and that requests read that slot, only the numbers can show.

Shape letters: N tokens of all probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from tora.batching.batch import pack
from tora.batching.packing import OwnPrompts
from tora.config.schema import RunConfig
from tora.errors import SyncError
from tora.types import LogprobRequest, Metrics, MicroBatch, Prompt, Rollout

NUM_PROBES = 4
_SCORED = 32
"""Tokens of a probe that are scored, or half of a shorter one."""
_MAX_GAP = {"fp32": 1e-4, "bf16": 0.1}
"""Mean difference of a token's log-prob. Between float32 engines it is around 1e-6, with bf16 in it 1e-3 to 4e-2."""


class Scorer(Protocol):
    """A `Learner`."""

    def logprobs(self, batch: MicroBatch, *, adapter: bool) -> np.ndarray: ...


class Scorers(Protocol):
    """`Rollouts`."""

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> dict[int, list[np.ndarray]]: ...


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probs of the same tokens by the same model, [N] each; `off_N` is None for a model without adapter."""

    on_N: np.ndarray
    off_N: np.ndarray | None

    @property
    def effect(self) -> float:
        """How much the adapter does: the mean difference that it makes."""
        return 0.0 if self.off_N is None else mean_gap(self.on_N, self.off_N)


def mean_gap(a_N: np.ndarray, b_N: np.ndarray) -> float:
    return float(np.abs(a_N - b_N).mean())


def broken(learner: Scores, engine: Scores, max_gap: float) -> str | None:
    """What is wrong, as a clause; None where nothing is.

    The bound is `max_gap` and, so that an adapter shows that has not learnt much yet, a quarter of its effect over
    what the base itself differs by.
    """
    gap = mean_gap(learner.on_N, engine.on_N)
    if learner.off_N is None or engine.off_N is None:
        return f"differ by {gap:.2g} a token, more than {max_gap:.2g}" if gap > max_gap else None
    base = mean_gap(learner.off_N, engine.off_N)
    if base > max_gap:
        return f"differ by {base:.2g} a token without the adapter, more than {max_gap:.2g}: the bases are not the same"
    noise = max(3 * base, max_gap / 10)
    if learner.effect > noise and not (engine.on_N != engine.off_N).any():
        return f"are the base's in the engine, and the adapter moves the learner's by {learner.effect:.2g}"
    if gap > min(max_gap, noise + learner.effect / 4):
        return (
            f"differ by {gap:.2g} a token with the adapter and by {base:.2g} without it, and it moves the learner's by "
            f"{learner.effect:.2g}: it was applied in part, or wrongly, or to another slot"
        )
    return None


class Canary:
    """Fixed tokens, scored by the learner and by every engine."""

    def __init__(
        self,
        probes: Sequence[Prompt],
        *,
        every: int,
        max_gap: float,
        has_adapter: bool,
        image_token: int | None = None,
    ) -> None:
        """`every` so many versions, and at the first sync; 0 is never. What is scored is a prompt's own end, behind its
        last `image_token`."""
        self._every, self._max_gap, self._has_adapter = every, max_gap, has_adapter
        self._is_first = True
        cuts = [_cut(p.token_ids, image_token) for p in probes]
        parts = [(p.token_ids[:cut], p.token_ids[cut:]) for p, cut in zip(probes, cuts, strict=True)]
        self._requests = [LogprobRequest(*part, p.images) for p, part in zip(probes, parts, strict=True)]
        sequences = [
            (replace(p, token_ids=given), _rollout(scored), 0.0, i)
            for i, (p, (given, scored)) in enumerate(zip(probes, parts, strict=True))
        ]
        self._batch = pack(OwnPrompts(), sequences, [1.0] * len(sequences))

    @classmethod
    def of(cls, cfg: RunConfig, probes: Sequence[Prompt], image_token: int | None = None) -> Canary:
        dtypes = {cfg.dtype, cfg.rollout.dtype or cfg.dtype}
        max_gap = cfg.sync.canary_max_gap or _MAX_GAP["bf16" if "bf16" in dtypes else "fp32"]
        has_adapter = cfg.model.lora_type != "full"
        every = cfg.sync.canary_every
        return cls(probes, every=every, max_gap=max_gap, has_adapter=has_adapter, image_token=image_token)

    def check(self, version: int, learner: Scorer, rollouts: Scorers) -> Metrics:
        """Call once learner and engines should be at `version`. Errors: SyncError, which says what differs."""
        if not self._every or (version % self._every and not self._is_first):
            return {}
        self._is_first = False
        ours = self._scores(lambda adapter: learner.logprobs(self._batch, adapter=adapter))
        engines = self._engines(rollouts)
        if not engines:
            return {}  # all workers are starting again
        for number, engine in engines.items():
            if sentence := broken(ours, engine, self._max_gap):
                raise SyncError(
                    f"rollout worker {number} does not serve policy version {version}: the canary's log-probs "
                    f"{sentence} (sync.canary_max_gap)"
                )
        return {
            "canary/gap_mean": max(mean_gap(ours.on_N, engine.on_N) for engine in engines.values()),
            "canary/gap_max": max(float(np.abs(ours.on_N - engine.on_N).max()) for engine in engines.values()),
            "canary/effect": ours.effect,
        }

    def _scores(self, score: Any) -> Scores:
        return Scores(score(True), score(False) if self._has_adapter else None)

    def _engines(self, rollouts: Scorers) -> dict[int, Scores]:
        """Of every worker that answered; one may be lost between two questions."""
        on = rollouts.logprobs(self._requests, adapter=True)
        if not self._has_adapter:
            return {number: Scores(np.concatenate(each), None) for number, each in on.items()}
        off = rollouts.logprobs(self._requests, adapter=False)
        both = [number for number in on if number in off]
        return {number: Scores(np.concatenate(on[number]), np.concatenate(off[number])) for number in both}


def _cut(token_ids: Sequence[int], image_token: int | None) -> int:
    """Where the scored part of a prompt begins."""
    images_end = max((i + 1 for i, token in enumerate(token_ids) if token == image_token), default=0)
    return max(len(token_ids) - _SCORED, len(token_ids) // 2, images_end)


def _rollout(token_ids: Sequence[int]) -> Rollout:
    """Tokens that nobody sampled."""
    count = len(token_ids)
    return Rollout(
        token_ids=np.asarray(token_ids, np.int64),
        actor_logprobs=np.zeros(count, np.float32),
        versions=np.zeros(count, np.int64),
        stopped=False,
        text="",
        reward=0.0,
        reward_parts={},
    )
