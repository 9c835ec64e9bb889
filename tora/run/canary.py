"""Proof that every engine serves the policy the learner holds: both compute log-probs of the same tokens.

The digest of a sync proves that the tensors arrived under the engine's own names. It cannot prove that those names are
the right layers, that the scaling is right, or that requests use that adapter slot; only the outputs can.

Shape letters: N tokens of all probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from tora.batching.batch import pack
from tora.batching.packing import OwnPrompts
from tora.config.schema import RunConfig
from tora.errors import SyncError
from tora.types import LogprobRequest, Metrics, MicroBatch, Prompt, Rollout, StopReason

NUM_PROBES = 4
_PROBE_TOKENS = 32
"""Tokens of each probe whose log-probs are compared; half of a probe shorter than twice as many."""
_MAX_GAP = {"fp32": 1e-4, "bf16": 0.1}
"""Bound on the mean absolute difference, in nats a token. Float32 engines differ by around 1e-6; where bf16 is
involved, by 1e-3 to 4e-2."""


_EFFECT_SHARE = 0.05
"""Share of the adapter's effect by which a gap may exceed the noise. A scaling that is off by a tenth shows as about
0.1 of the effect."""


class LearnerLogprobs(Protocol):
    """The part of `tora.protocols.Learner` that the canary needs."""

    def logprobs(self, batch: MicroBatch, *, adapter: bool) -> np.ndarray: ...


class EngineLogprobs(Protocol):
    """The part of `tora.protocols.Rollouts` that the canary needs."""

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> dict[int, list[np.ndarray]]: ...


@dataclass(frozen=True, slots=True)
class ProbeLogprobs:
    """One model's log-probs of the probes with the adapter on and off, [N] each; `off_N` is None without an adapter."""

    on_N: np.ndarray
    off_N: np.ndarray | None

    @property
    def effect(self) -> float:
        """Mean absolute change that the adapter makes, in nats a token."""
        return 0.0 if self.off_N is None else mean_gap(self.on_N, self.off_N)


def mean_gap(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Mean absolute difference, in nats a token."""
    return float(np.abs(a_N - b_N).mean())


def find_disagreement(learner: ProbeLogprobs, engine: ProbeLogprobs, max_gap: float) -> str | None:
    """How the engine's log-probs disagree with the learner's, as a clause; None if they agree.

    The mean gap must not exceed `max_gap`. With an adapter it must not exceed a share of the adapter's effect plus
    the base's noise either, so that an adapter that has learned little yet is still checked. A gap of nan disagrees.
    """
    gap = mean_gap(learner.on_N, engine.on_N)
    if learner.off_N is None or engine.off_N is None:
        return None if gap <= max_gap else f"differ by {gap:.2g} a token, more than {max_gap:.2g}"
    base = mean_gap(learner.off_N, engine.off_N)
    if not base <= max_gap:
        return f"differ by {base:.2g} a token without the adapter, more than {max_gap:.2g}: the bases are not the same"
    noise = max(3 * base, max_gap / 10)
    if not learner.effect <= noise and not (engine.on_N != engine.off_N).any():
        return f"are the base's in the engine, and the adapter moves the learner's by {learner.effect:.2g}"
    if not (gap <= max_gap and gap <= noise + _EFFECT_SHARE * learner.effect):
        return (
            f"differ by {gap:.2g} a token with the adapter and by {base:.2g} without it, and it moves the learner's by "
            f"{learner.effect:.2g}: it was applied in part, wrongly, or to another slot"
        )
    return None


class Canary:
    """Fixed tokens whose log-probs the learner and every engine compute after a sync."""

    def __init__(
        self,
        probes: Sequence[Prompt],
        *,
        every: int,
        max_gap: float,
        has_adapter: bool,
        image_token: int | None = None,
    ) -> None:
        """`every`: check each version divisible by it, and the first sync; 0 disables the canary. The compared tokens
        are the end of each probe, after its last `image_token`."""
        self._every, self._max_gap, self._has_adapter = every, max_gap, has_adapter
        self._is_first = True
        splits = [_split_index(p.token_ids, image_token) for p in probes]
        parts = [(p.token_ids[:split], p.token_ids[split:]) for p, split in zip(probes, splits, strict=True)]
        self._requests = [LogprobRequest(*part, p.images) for p, part in zip(probes, parts, strict=True)]
        sequences = [
            (replace(p, token_ids=context), _unsampled_rollout(compared), 0.0, i)
            for i, (p, (context, compared)) in enumerate(zip(probes, parts, strict=True))
        ]
        self._batch = pack(OwnPrompts(), sequences, [1.0] * len(sequences))

    @classmethod
    def from_config(cls, cfg: RunConfig, probes: Sequence[Prompt], image_token: int | None = None) -> Canary:
        dtypes = {cfg.dtype, cfg.rollout.dtype or cfg.dtype}
        max_gap = cfg.sync.canary_max_gap or _MAX_GAP["bf16" if "bf16" in dtypes else "fp32"]
        has_adapter = cfg.model.lora_type != "full"
        every = cfg.sync.canary_every
        return cls(probes, every=every, max_gap=max_gap, has_adapter=has_adapter, image_token=image_token)

    def check(self, version: int, learner: LearnerLogprobs, rollouts: EngineLogprobs) -> Metrics:
        """Call once learner and engines should be at `version`; no metrics for a version that is not checked.

        Raises SyncError if an engine disagrees with the learner, and says how.
        """
        if not self._every or (version % self._every and not self._is_first):
            return {}
        self._is_first = False
        return self._compare(learner, rollouts, f"version {version}")

    def try_out(self, learner: LearnerLogprobs, rollouts: EngineLogprobs) -> None:
        """The check of a random adapter, before the first sync. Raises SyncError as `check` does."""
        self._compare(learner, rollouts, "with a random adapter")

    def _compare(self, learner: LearnerLogprobs, rollouts: EngineLogprobs, policy: str) -> Metrics:
        ours = self._learner_logprobs(learner)
        engines = self._engine_logprobs(rollouts)
        if not engines:
            return {}  # every worker is restarting
        for number, engine in engines.items():
            if clause := find_disagreement(ours, engine, self._max_gap):
                raise SyncError(
                    f"rollout worker {number} does not serve policy {policy}: the canary's log-probs "
                    f"{clause} (sync.canary_max_gap)"
                )
        return {
            "canary/gap_mean": max(mean_gap(ours.on_N, engine.on_N) for engine in engines.values()),
            "canary/gap_max": max(float(np.abs(ours.on_N - engine.on_N).max()) for engine in engines.values()),
            "canary/effect": ours.effect,
        }

    def _learner_logprobs(self, learner: LearnerLogprobs) -> ProbeLogprobs:
        on_N = learner.logprobs(self._batch, adapter=True)
        return ProbeLogprobs(on_N, learner.logprobs(self._batch, adapter=False) if self._has_adapter else None)

    def _engine_logprobs(self, rollouts: EngineLogprobs) -> dict[int, ProbeLogprobs]:
        """By worker number, for every worker that answered both requests; one may be lost between them."""
        on = rollouts.logprobs(self._requests, adapter=True)
        if not self._has_adapter:
            return {number: ProbeLogprobs(np.concatenate(each), None) for number, each in on.items()}
        off = rollouts.logprobs(self._requests, adapter=False)
        both = [number for number in on if number in off]
        return {number: ProbeLogprobs(np.concatenate(on[number]), np.concatenate(off[number])) for number in both}


def _split_index(token_ids: Sequence[int], image_token: int | None) -> int:
    """Index of a probe's first compared token."""
    images_end = max((i + 1 for i, token in enumerate(token_ids) if token == image_token), default=0)
    return max(len(token_ids) - _PROBE_TOKENS, len(token_ids) // 2, images_end)


def _unsampled_rollout(token_ids: Sequence[int]) -> Rollout:
    """A rollout of given tokens, with placeholders for everything that sampling would have filled in."""
    count = len(token_ids)
    return Rollout(
        token_ids=np.asarray(token_ids, np.int64),
        sampled=np.ones(count, bool),  # the learner returns log-probs of sampled tokens only
        actor_logprobs=np.zeros(count, np.float32),
        versions=np.zeros(count, np.int64),
        stop_reason=StopReason.LENGTH,
        text="",
        reward=0.0,
        reward_parts={},
    )
