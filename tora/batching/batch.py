"""Groups -> packed micro-batches. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tora.batching.advantage import advantages_by_group, group_advantages
from tora.batching.packing import OwnPrompts, Packing, SharedPrompts, TrainSequence, distinct
from tora.config.schema import LossNormalization
from tora.types import Group, MicroBatch


def token_weights(lengths_B: Sequence[int], normalization: LossNormalization, max_generated_tokens: int) -> list[float]:
    """The weight of each token of sequence b in the loss. Over all tokens they sum to 1, but for `constant`.

    `constant` is Dr. GRPO's (Liu et al. 2025): a token weighs the same in a short completion as in a long one, and in
    one batch as in another.
    """
    if normalization == "token":
        return [1.0 / sum(lengths_B)] * len(lengths_B)
    if normalization == "constant":
        return [1.0 / (len(lengths_B) * max_generated_tokens)] * len(lengths_B)
    return [1.0 / (len(lengths_B) * n) for n in lengths_B]


def pack(packing: Packing, sequences_B: Sequence[TrainSequence], weights_B: Sequence[float]) -> MicroBatch:
    _, rollouts, advantages, groups = zip(*sequences_B, strict=True)
    counts = [len(rollout.token_ids) for rollout in rollouts]
    images, image_I = distinct([image for prompt in packing.prompts(sequences_B) for image in prompt.images])
    return MicroBatch(
        **packing.lay_out(sequences_B),
        targets_N=np.concatenate([r.token_ids for r in rollouts]).astype(np.int64),
        sequence_N=np.repeat(np.arange(len(counts)), counts).astype(np.int64),
        actor_logprobs_N=np.concatenate([r.actor_logprobs for r in rollouts]).astype(np.float32),
        versions_N=np.concatenate([r.versions for r in rollouts]).astype(np.int64),
        advantages_N=np.repeat(advantages, counts).astype(np.float32),
        weights_N=np.repeat(weights_B, counts).astype(np.float32),
        rewards_B=np.asarray([r.reward for r in rollouts], dtype=np.float64),
        groups_B=np.asarray(groups, dtype=np.int64),
        image_I=image_I,
        images=images,
    )


def micro_batches(
    groups_P: Sequence[Group],
    *,
    normalize_advantages: bool,
    normalization: LossNormalization,
    max_generated_tokens: int,
    capacity: int,
    num_ranks: int = 1,
    share_prefix: bool = False,
) -> tuple[MicroBatch, ...]:
    """Every rollout of every group with a signal, packed to `capacity` tokens. Empty where no group has one.

    Their number is a multiple of `num_ranks`, as far as there are sequences for it. `share_prefix`: a group's prompt
    stands once in a micro-batch.
    """
    packing: Packing = SharedPrompts() if share_prefix else OwnPrompts()
    sequences: list[TrainSequence] = []
    for number, group in enumerate(groups_P):
        if group.has_signal:
            advantages_G = group_advantages([r.reward for r in group.rollouts], normalize_advantages)
            pairs = zip(group.rollouts, advantages_G, strict=True)
            sequences += [(group.prompt, rollout, float(advantage), number) for rollout, advantage in pairs]
    if not sequences:
        return ()
    weights = token_weights([len(r.token_ids) for _, r, _, _ in sequences], normalization, max_generated_tokens)
    return tuple(
        pack(packing, [sequences[i] for i in indices], [weights[i] for i in indices])
        for indices in packing.bins(sequences, capacity, num_ranks)
    )


def penalize(
    micro_batches: Sequence[MicroBatch], penalties_B: np.ndarray, normalize_advantages: bool
) -> list[MicroBatch]:
    """The same with the advantages of rewards less `penalties_B`, which has all sequences in the micro-batches' order.

    They must be all of the step's, since an advantage depends on the rewards of its whole group.
    """
    rewards_B = np.concatenate([m.rewards_B for m in micro_batches]) - penalties_B
    groups_B = np.concatenate([m.groups_B for m in micro_batches])
    advantages_B = advantages_by_group(rewards_B, groups_B, normalize_advantages).astype(np.float32)
    parts = np.split(advantages_B, np.cumsum([len(m.lengths_B) for m in micro_batches])[:-1])
    return [replace(m, advantages_N=part[m.sequence_N]) for m, part in zip(micro_batches, parts, strict=True)]
