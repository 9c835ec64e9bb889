"""Values that are not finite: whether an update may be made, where they come from, and whether weights are still sound.

Shape letters: N response tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch.nn.utils import get_total_norm

from tora.distributed.process_group import gather_objects, sum_over_ranks
from tora.distributed.sharding import local
from tora.errors import TrainingError
from tora.types import MicroBatch

_NAMED_PROMPTS = 5
"""Maximum number of prompts listed in a message."""


def not_finite(**values: float) -> str:
    """A clause that names the values that are not finite; empty if all are."""
    return " and ".join(f"{name.replace('_', ' ')} is {v}" for name, v in values.items() if not math.isfinite(v))


def suspects(
    share: Sequence[MicroBatch], values: Mapping[str, Sequence[torch.Tensor | None]], prompt_ids: Sequence[int]
) -> str:
    """A clause that names the prompts whose tokens have values that are not finite, for each kind of `values`.
    Collective; the same on every rank.

    `values`: by name, a tensor [N] for each micro-batch of this rank's `share`. `prompt_ids`: of the step's groups.
    """
    own: dict[str, set[int]] = {}
    for name, tensors in values.items():
        groups = set()
        for batch, values_N in zip(share, tensors, strict=True):
            if values_N is not None:
                bad_N = ~values_N.isfinite().cpu().numpy()
                groups |= set(batch.groups_B[batch.sequence_N[bad_N]].tolist())
        own[name] = groups
    merged: defaultdict[str, set[int]] = defaultdict(set)
    for found in gather_objects(own):
        for name, groups in found.items():
            merged[name] |= groups
    named = [f"{name} of {_prompts(groups, prompt_ids)}" for name, groups in merged.items() if groups]
    return f"not finite are the {', the '.join(named)}" if named else "every log-prob and advantage is finite"


def _prompts(groups: set[int], prompt_ids: Sequence[int]) -> str:
    ids = sorted(prompt_ids[group] if group < len(prompt_ids) else group for group in groups)
    listed = ", ".join(map(str, ids[:_NAMED_PROMPTS]))
    more = f" and {len(ids) - _NAMED_PROMPTS} more" if len(ids) > _NAMED_PROMPTS else ""
    return f"{'prompt' if len(ids) == 1 else 'prompts'} {listed}{more}"


@torch.no_grad()
def check_weights(parameters: Iterable[torch.Tensor], version: int) -> None:
    """Raises TrainingError if a trained weight is not finite, on every rank alike. Collective."""
    # the norm, since `isfinite` takes 40 times as long on a CPU
    norm = get_total_norm([local(parameter) for parameter in parameters])
    if not sum_over_ranks(norm).isfinite():
        raise TrainingError(
            f"the optimizer made weights that are not finite, from a loss and a gradient that are, in the step to "
            f"policy version {version}; the newest checkpoint is from before it. Lower optimizer.lr."
        )
