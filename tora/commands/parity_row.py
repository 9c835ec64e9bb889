"""One row of `tora doctor --parity`: an engine's log-probs against the learner's, for one method and dtype.

A gap is judged by what the dtype costs without an adapter and by what the adapter does, not by a fixed number of nats:
both depend on the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from tora.adapters.inject import refresh, trained_parameters
from tora.batching.batch import pack
from tora.batching.packing import OwnPrompts
from tora.models.base import Decoder
from tora.protocols import Engine
from tora.types import LogprobRequest, MicroBatch, Prompt, Rollout, SampleRequest, Sampling, StopReason

Method = Literal["lora", "dora", "qlora", "qdora"]
_SAMPLES, _NEW_TOKENS = 4, 32
_NOISE_STD = 0.05
"""Standard deviation of the random adapter."""
_MAX_FP32_GAP = 1e-4
"""Largest mean difference of float32 log-probs without an adapter, in nats."""
_MAX_OFF, _MAX_ON = 3.0, 2.0
"""Largest gaps without and with the adapter, as multiples of what the dtype costs without one. Measured in bf16 on two
tiny models, two adapters of each kind, 512 tokens each: 1.2 to 1.5 without, 0.9 to 1.13 with."""
_EFFECT_SHARE = {"fp32": 1e-3, "bf16": 0.02}
"""Added to the second: this share of the adapter's effect, since an adapter moves the model to where it rounds
differently. A scaling that is off by a tenth showed as 0.08 to 0.12 of the effect."""


@dataclass(frozen=True, slots=True)
class ParityRow:
    """Absolute differences between the log-probs of engine and learner for the same tokens, in nats."""

    method: Method
    dtype: str
    sampled_mean: float
    """With the adapter; the engine's log-probs are those it reported while sampling."""
    sampled_max: float
    on_mean: float
    """With the adapter; the engine's log-probs are those it computes for given tokens."""
    on_max: float
    off_mean: float
    """Without the adapter."""
    off_max: float
    effect: float
    """Mean difference that the adapter makes to the learner's log-probs."""
    rounding: float
    """Mean difference that the dtype makes to the learner's log-probs without the adapter; 0 in float32."""
    tokens: int
    """Number of tokens compared."""

    @property
    def off_bound(self) -> float:
        """Largest `off_mean` that passes."""
        return _MAX_OFF * self.rounding if self.rounding else _MAX_FP32_GAP

    @property
    def on_bound(self) -> float:
        """Largest `on_mean` and `sampled_mean` that pass."""
        return _MAX_ON * max(self.off_mean, self.rounding) + _EFFECT_SHARE[self.dtype] * self.effect

    @property
    def bounds(self) -> dict[str, float]:
        return {"on_bound": self.on_bound, "off_bound": self.off_bound}

    @property
    def holds(self) -> bool:
        """False too if any figure is NaN, or the adapter does not stand out from the noise."""
        on = self.sampled_mean <= self.on_bound and self.on_mean <= self.on_bound
        return on and self.off_mean <= self.off_bound and self.effect > self.on_bound


@dataclass(frozen=True, slots=True)
class Reference:
    """Tokens, and a learner's log-probs of them without an adapter."""

    batch: MicroBatch
    logprobs_N: np.ndarray

    def gap(self, learner: Any) -> float:
        """Mean difference of another learner's log-probs of the same tokens."""
        return float(np.abs(learner.logprobs(self.batch, adapter=False) - self.logprobs_N).mean())


def compare(
    method: Method,
    engine: Engine,
    learner: Any,
    prompts: Sequence[Prompt],
    *,
    version: int = 0,
    rounding: float = 0.0,
) -> tuple[ParityRow, Reference]:
    """Give the learner a random adapter, send it to the engine, sample with it, and compare both models' log-probs.

    `learner`: a `learner.learner.Learner`; typed loosely, since importing it takes seconds. `rounding`: see
    `ParityRow`. Also returns the tokens, with the learner's log-probs without the adapter.
    """
    randomize_adapter(learner.model, seed=version)
    learner.version = version
    engine.install(learner.snapshot())
    sampling = Sampling(_NEW_TOKENS)
    groups = engine.generate([SampleRequest(p.token_ids, _SAMPLES, p.id, sampling, p.images) for p in prompts])
    sampled = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    asked = [LogprobRequest(p.token_ids, tuple(c.token_ids.tolist()), p.images) for p, c in sampled]
    sequences = [
        (p, Rollout(c.token_ids, c.versions >= 0, c.logprobs, c.versions, StopReason.LENGTH, "", 0.0, {}), 0.0, i)
        for i, (p, c) in enumerate(sampled)
    ]
    batch = pack(OwnPrompts(), sequences, [1.0] * len(sequences))
    ours = {adapter: learner.logprobs(batch, adapter=adapter) for adapter in (True, False)}
    theirs = {adapter: np.concatenate(engine.logprobs(asked, adapter=adapter)) for adapter in (True, False)}
    gaps = [np.abs(a - b) for a, b in ((batch.actor_logprobs_N, ours[True]), *((theirs[k], ours[k]) for k in ours))]
    row = ParityRow(
        method,
        learner.cfg.dtype,
        *(float(value) for gap in gaps for value in (gap.mean(), gap.max())),
        effect=float(np.abs(ours[True] - ours[False]).mean()),
        rounding=rounding,
        tokens=len(batch.targets_N),
    )
    return row, Reference(batch, ours[False])


@torch.no_grad()
def randomize_adapter(model: Decoder, seed: int) -> None:
    """Gives every adapter tensor random values, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trained_parameters(model).items():
        noise = _NOISE_STD * torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.mul_(1 + noise) if "magnitude" in name else parameter.add_(noise)
    refresh(model)
