"""The small sections of the config: see `tora.config.schema`, which holds the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tora.config.bounds import Above, AtLeast


@dataclass(kw_only=True)
class SyncConfig:
    canary_every: Annotated[int, AtLeast(0)] = 10
    """Steps between canary checks, which compare the log-probs of learner and engines for the same tokens, with the
    adapter and without. The first sync is always checked. The run stops if they differ. 0: no checks at all."""
    canary_max_gap: Annotated[float, Above(0)] | None = None
    """Largest mean difference of a token's log-prob, in nats, that a canary check accepts. The check is stricter while
    the adapter's effect is small. null: 1e-4 if learner and engine both run in float32, otherwise 0.1."""


@dataclass(kw_only=True)
class CheckpointConfig:
    every: Annotated[int, AtLeast(1)] = 50
    """Steps between checkpoints. The last step always writes one, and so does a run that is interrupted."""
    keep: Annotated[int, AtLeast(1)] = 2
    """Number of newest checkpoints to keep; older ones are deleted."""
