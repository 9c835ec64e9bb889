"""Scores of held-out rollouts: mean reward, accuracy, pass@k, lengths, and how sure they are.

Shape letters: P prompts, N rollouts of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tora.types import Group, Prompt, Rollout

Passes = Callable[[Rollout], bool]
"""Whether a rollout solves its prompt."""
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Held-out scores of one policy version on one set of prompts. A rollout that is left out counts as 0."""

    reward: float
    """Mean over the rollouts."""
    num_prompts: int
    accuracy: float | None = None
    """Share of rollouts that pass; None for a run whose rewards declare no accuracy."""
    pass_at: Mapping[int, float] = field(default_factory=dict)
    """pass@k by k, for several rollouts a prompt."""
    length: float = 0.0
    """Mean number of sampled tokens."""
    truncated: float = 0.0
    """Share of rollouts that were cut off by a token limit."""
    name: str = ""
    """Of the set; empty for that of `eval.dataset`."""
    sample: tuple[Prompt, Rollout] | None = None
    """One prompt and its rollout, to print; None if every reward failed."""


def passes_by(accuracy: str | None) -> Passes | None:
    """A rollout passes if it scores at least 1 in the reward of that name. None without such a reward."""
    return None if accuracy is None else lambda rollout: rollout.reward_parts[accuracy] >= 1


def summarize(groups_P: Sequence[Group], num_samples: int, passes: Passes | None, name: str = "") -> EvalResult:
    """The result of one set of prompts, of which each was answered `num_samples` times. A rollout that was left out
    has reward 0 and does not pass; lengths and truncation are those of the others."""
    answered = [(group.prompt, rollout) for group in groups_P for rollout in group.rollouts]
    rollouts = [rollout for _, rollout in answered]
    passed_P = None if passes is None else num_passed(groups_P, passes)
    total = max(1, len(groups_P) * num_samples)
    return EvalResult(
        name=name,
        reward=math.fsum(rollout.reward for rollout in rollouts) / total,
        accuracy=None if passed_P is None else sum(passed_P) / total,
        pass_at={} if passed_P is None or num_samples == 1 else mean_pass_at(passed_P, num_samples),
        num_prompts=len(groups_P),
        length=float(np.mean([rollout.num_sampled for rollout in rollouts])) if rollouts else 0.0,
        truncated=float(np.mean([rollout.truncated for rollout in rollouts])) if rollouts else 0.0,
        sample=answered[0] if answered else None,
    )


def summarize_sets(
    groups_P: Sequence[Group], sizes: Mapping[str, int], num_samples: int, passes: Passes | None
) -> list[EvalResult]:
    """One result per set. `sizes`: the number of prompts of each set by name, in the order of `groups_P`."""
    assert sum(sizes.values()) == len(groups_P), "each group belongs to a set"
    results, start = [], 0
    for name, size in sizes.items():
        results.append(summarize(groups_P[start : start + size], num_samples, passes, name))
        start += size
    return results


def num_passed(groups_P: Sequence[Group], passes: Passes) -> list[int]:
    """How many rollouts of each prompt pass, [P]."""
    return [sum(passes(rollout) for rollout in group.rollouts) for group in groups_P]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that at least one of k samples passes, estimated without bias from n samples of which c pass:
    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374, equation 1). `k` is at most `n`."""
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    return 1.0 - math.prod((n - c - i) / (n - i) for i in range(k))


def mean_pass_at(passed_P: Sequence[int], num_samples: int) -> dict[int, float]:
    """pass@k, mean over prompts, for k = 1, 2, 4, ... and `num_samples` itself."""
    powers = [1 << i for i in range(num_samples.bit_length()) if 1 << i <= num_samples]
    ks = sorted({*powers, num_samples})
    return {k: float(np.mean([pass_at_k(num_samples, c, k) for c in passed_P])) if passed_P else 0.0 for k in ks}


def interval(values_P: Sequence[float], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """A confidence interval of the mean over prompts by the percentile bootstrap (Efron and Tibshirani 1993, chapter
    13): prompts are drawn again with replacement, each with all its rollouts. The same for the same seed."""
    values = np.asarray(values_P, dtype=np.float64)
    if not len(values):
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(_RESAMPLES)]
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def mean_intervals(
    groups_P: Sequence[Group], num_samples: int, passes: Passes | None
) -> dict[str, tuple[float, float]]:
    """95% intervals of the mean reward and, if something passes, of each pass@k, by name."""
    found = {"reward": interval([sum(r.reward for r in group.rollouts) / num_samples for group in groups_P])}
    if passes is not None:
        passed_P = num_passed(groups_P, passes)
        for k in mean_pass_at(passed_P, num_samples):
            found[f"pass@{k}"] = interval([pass_at_k(num_samples, c, k) for c in passed_P])
    return found
