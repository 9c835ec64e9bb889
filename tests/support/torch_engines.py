"""The torch engine over a learner's own model."""

from __future__ import annotations

from typing import Any

from actors.torch_engine.engine import TorchEngine
from learner.fsdp import unsharded
from learner.learner import Learner


def engine_of(learner: Learner, **options: Any) -> TorchEngine:
    """An engine for the learner's current policy, sharded or not. `options` go to `TorchEngine`."""
    engine = TorchEngine(
        learner.model,
        device=learner.device,
        shared=True,
        max_rows=100,
        while_generating=lambda: unsharded(learner.model, reshard_after_forward=True),
        **options,
    )
    engine.install(learner.snapshot())
    return engine
