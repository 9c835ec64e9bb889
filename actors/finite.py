"""Completions and rewards that training can use: those whose numbers are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tora.types import BadLogprob, Completion, FailedReward


def split_by_logprobs(completions_G: Sequence[Completion]) -> tuple[list[Completion], tuple[BadLogprob, ...]]:
    """The completions whose log-probs are all finite, and a description of each other one."""
    found_G = [_bad_logprob(completion) for completion in completions_G]
    sound = [completion for completion, bad in zip(completions_G, found_G, strict=True) if bad is None]
    return sound, tuple(bad for bad in found_G if bad is not None)


def _bad_logprob(completion: Completion) -> BadLogprob | None:
    for logprobs_L in (completion.logprobs, completion.sampling_logprobs):
        (bad,) = np.nonzero(~np.isfinite(logprobs_L))
        if len(bad):
            first = int(bad[0])
            return BadLogprob(first, float(logprobs_L[first]), int(completion.versions[first]))
    return None


def check_total(parts: Mapping[str, float], total: float) -> FailedReward | None:
    """The failure of a rollout whose weighted sum of finite scores is not finite itself; None if it is."""
    if math.isfinite(total):
        return None
    scores = ", ".join(f"{name} {score:g}" for name, score in parts.items())
    return FailedReward("weighted_sum", f"is {total:g}, of the scores {scores}")
