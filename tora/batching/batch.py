"""Groups of rollouts -> packed micro-batches. Pure numpy; shape letters as in `tora.types`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tora.batching.advantage import advantages_by_group, group_advantages
from tora.batching.packing import OwnPrompts, Packing, SharedPrompts, TrainSequence, distinct
from tora.config.schema import LossNormalization
from tora.types import Group, MicroBatch


def token_weights(lengths_B: Sequence[int], normalization: LossNormalization, max_generated_tokens: int) -> list[float]:
    """The weight in the loss of each token of sequence b, for each of B sequences with `lengths_B` response tokens.

    - `token`: 1 / (all tokens), the mean over tokens.
    - `sequence`: 1 / (B · length of b), the mean over each sequence's tokens, then over sequences.
    - `constant`: 1 / (B · `max_generated_tokens`), Dr. GRPO's (Liu et al. 2025, arXiv:2503.20783). A token's weight
      depends neither on the length of its completion nor on the other completions of the batch.

    Except for `constant`, the weights of all tokens sum to 1.
    """
    if normalization == "token":
        return [1.0 / sum(lengths_B)] * len(lengths_B)
    if normalization == "constant":
        return [1.0 / (len(lengths_B) * max_generated_tokens)] * len(lengths_B)
    return [1.0 / (len(lengths_B) * n) for n in lengths_B]


def pack(packing: Packing, sequences_B: Sequence[TrainSequence], weights_B: Sequence[float]) -> MicroBatch:
    """One micro-batch of the given sequences, whose response tokens have the weights `weights_B`."""
    _, rollouts, advantages, groups = zip(*sequences_B, strict=True)
    counts = [rollout.num_sampled for rollout in rollouts]
    images, image_I = distinct([image for prompt in packing.prompts(sequences_B) for image in prompt.images])
    return MicroBatch(
        **packing.lay_out(sequences_B),
        targets_N=np.concatenate([r.token_ids[r.sampled] for r in rollouts]).astype(np.int64),
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
    """All rollouts of groups whose rewards differ, packed into micro-batches of up to `capacity` tokens.

    The number of micro-batches is a multiple of `num_ranks` if there are enough sequences; 0 if no group has a signal.
    `share_prefix`: include a group's prompt once per micro-batch instead of once per rollout.
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
    weights = token_weights([r.num_sampled for _, r, _, _ in sequences], normalization, max_generated_tokens)
    return tuple(
        pack(packing, [sequences[i] for i in indices], [weights[i] for i in indices])
        for indices in packing.bins(sequences, capacity, num_ranks)
    )


def penalize(
    micro_batches: Sequence[MicroBatch], penalties_B: np.ndarray, normalize_advantages: bool
) -> list[MicroBatch]:
    """The same micro-batches with the advantages of rewards minus `penalties_B`, [B] in the order of their sequences.

    Pass all micro-batches of the step, since an advantage depends on the rewards of the entire group.
    """
    rewards_B = np.concatenate([m.rewards_B for m in micro_batches]) - penalties_B
    groups_B = np.concatenate([m.groups_B for m in micro_batches])
    advantages_B = advantages_by_group(rewards_B, groups_B, normalize_advantages).astype(np.float32)
    parts = np.split(advantages_B, np.cumsum([len(m.lengths_B) for m in micro_batches])[:-1])
    return [replace(m, advantages_N=part[m.sequence_N]) for m, part in zip(micro_batches, parts, strict=True)]
