"""The KL term in the reward: advantages of r - β Σ_t KL_t in place of r's.

Shape letters: N response tokens, B sequences of all the step's micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from learner.device_batch import Inputs
from learner.fsdp import share_micro_batches, shares
from learner.loss.kl import KLType, sequence_kl
from tora.batching.batch import penalize
from tora.config.schema import Advantage
from tora.distributed.process_group import World, sum_over_ranks
from tora.types import MicroBatch


def with_reward_kl(
    inputs: Sequence[Inputs],
    ref_logprobs: Sequence[torch.Tensor],
    step_batches: Sequence[MicroBatch],
    world: World,
    *,
    kl_coeff: float,
    kl_type: KLType,
    advantage: Advantage,
    normalize_advantages: bool,
) -> list[Inputs]:
    """This rank's `inputs`, with penalized advantages. Collective.

    `inputs` and `ref_logprobs` ([N] float32 each) are this rank's share of `step_batches`, the micro-batches of all
    ranks. A group may be spread over ranks, so every rank needs the KL of every sequence.
    """
    sizes = [len(batch.lengths_B) for batch in step_batches]
    kl_B = torch.zeros(sum(sizes), dtype=torch.float64, device=inputs[0].lengths_B.device)
    parts = kl_B.split(sizes)
    own = shares(step_batches, world.size)[world.rank]
    for (index, counts), x, ref_N in zip(own, inputs, ref_logprobs, strict=True):
        if counts:  # an idle rank's micro-batch is a copy of another rank's
            parts[index].copy_(sequence_kl(x.actor_logprobs_N, ref_N, x.sequence_N, len(x.lengths_B), kl_type))
    penalties_B = (kl_coeff * sum_over_ranks(kl_B)).cpu().numpy()
    penalized = penalize(step_batches, penalties_B, advantage, normalize_advantages)
    return [
        replace(x, advantages_N=torch.tensor(batch.advantages_N, device=kl_B.device))
        for x, batch in zip(inputs, share_micro_batches(penalized, world.rank, world.size), strict=True)
    ]
