"""How far the learner's log-probs are from the actors' at the start of a step.

Shape letters: N response tokens.
"""

from __future__ import annotations

import numpy as np

from learner.loss.ratio import MAX_LOG_RATIO
from tora.types import Metrics

_QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


def mismatch(log_ratio_N: np.ndarray, versions_N: np.ndarray) -> Metrics:
    """Metrics from log π_learner / π_actor of all the step's tokens, before its first update, and their versions.

    `mismatch_kl`: k3 estimate of KL(actor ‖ learner) in nats a token, over the tokens of the newest version; at
    staleness 0 it measures only the difference between the engines' numerics. `policy_kl`: the same over all tokens.
    `mismatch_max_ratio`: the largest ratio. `importance/ratio_*`: quantiles of the ratio. `importance/ess`:
    (Σ ratio)² / (N Σ ratio²), the effective sample size as a share of the tokens (Kong 1992). Log-ratios above
    `MAX_LOG_RATIO` count as that. No metrics without tokens.
    """
    if not len(log_ratio_N):
        return {}
    d_N = np.minimum(log_ratio_N.astype(np.float64), MAX_LOG_RATIO)
    ratio_N, k3_N = np.exp(d_N), np.expm1(d_N) - d_N
    quantiles = np.quantile(ratio_N, list(_QUANTILES.values()))
    return {
        "mismatch_kl": float(k3_N[versions_N == versions_N.max()].mean()),
        "policy_kl": float(k3_N.mean()),
        "mismatch_max_ratio": float(ratio_N.max()),
        "importance/ess": float(ratio_N.sum() ** 2 / (len(ratio_N) * (ratio_N**2).sum())),
        **{f"importance/ratio_{name}": float(value) for name, value in zip(_QUANTILES, quantiles, strict=True)},
    }
