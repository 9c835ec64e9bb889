"""Whether an evaluation is the best so far, and for how long none has been."""

from __future__ import annotations

import math

from tora.config.schema import EvalConfig
from tora.reporting.evaluation import EvalResult
from tora.run.checkpoints import RunState


def is_best(state: RunState, result: EvalResult) -> bool:
    """Records the held-out reward in `state`. True for one higher than any before it; a reward that is not finite
    never is."""
    if math.isfinite(result.reward) and (state.best_reward is None or result.reward > state.best_reward):
        state.best_reward, state.evals_since_best = result.reward, 0
        return True
    state.evals_since_best += 1
    return False


def stops_early(state: RunState, cfg: EvalConfig | None) -> bool:
    """Whether `eval.early_stop` evaluations in a row were not the best."""
    return cfg is not None and cfg.early_stop is not None and state.evals_since_best >= cfg.early_stop
