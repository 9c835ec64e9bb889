"""Groups -> packed micro-batches. Pure numpy, and the only place that lays tokens out for the learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tora.advantage import advantages_by_group, group_advantages
from tora.config import LossNormalization
from tora.types import Group, MicroBatch, Prompt, Rollout

Sequence_ = tuple[Prompt, Rollout, float, int]
"""A rollout with its prompt, its advantage and the number of its group."""


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices packed first-fit by decreasing length; no bin exceeds `capacity` unless a single length does."""
    result: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((b for b, free in enumerate(room) if free >= lengths[index]), None)
        if place is None:
            result.append([])
            room.append(capacity)
            place = len(room) - 1
        result[place].append(index)
        room[place] -= lengths[index]
    return result


def spread(packed: list[list[int]], lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Halve the longest bins that can be, until their number is a multiple of `num_ranks`."""
    packed = list(packed)
    while len(packed) % num_ranks and any(len(indices) > 1 for indices in packed):
        longest = max((b for b in packed if len(b) > 1), key=lambda b: sum(lengths[i] for i in b))
        packed.remove(longest)
        halves: tuple[list[int], list[int]] = ([], [])
        for index in sorted(longest, key=lambda i: -lengths[i]):
            min(halves, key=lambda half: sum(lengths[i] for i in half)).append(index)
        packed += halves
    return packed


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


def pack(sequences_B: Sequence[Sequence_], weights_B: Sequence[float]) -> MicroBatch:
    """Lay prompt and completion of each sequence end to end."""
    prompts, rollouts, advantages, groups = zip(*sequences_B, strict=True)
    prompt_lengths = [len(prompt.token_ids) for prompt in prompts]
    lengths = [n + len(rollout.token_ids) for n, rollout in zip(prompt_lengths, rollouts, strict=True)]
    starts = np.cumsum([0, *lengths[:-1]])
    counts = [len(rollout.token_ids) for rollout in rollouts]
    tokens = [np.concatenate([p.token_ids, r.token_ids]) for p, r in zip(prompts, rollouts, strict=True)]
    # the position before a response token is the one that predicts it
    response = [s + n - 1 + np.arange(c) for s, n, c in zip(starts, prompt_lengths, counts, strict=True)]
    return MicroBatch(
        tokens_T=np.concatenate(tokens).astype(np.int64),
        lengths_B=np.asarray(lengths, dtype=np.int64),
        response_N=np.concatenate(response).astype(np.int64),
        targets_N=np.concatenate([r.token_ids for r in rollouts]).astype(np.int64),
        sequence_N=np.repeat(np.arange(len(counts)), counts).astype(np.int64),
        actor_logprobs_N=np.concatenate([r.actor_logprobs for r in rollouts]).astype(np.float32),
        versions_N=np.concatenate([r.versions for r in rollouts]).astype(np.int64),
        advantages_N=np.repeat(advantages, counts).astype(np.float32),
        weights_N=np.repeat(weights_B, counts).astype(np.float32),
        rewards_B=np.asarray([r.reward for r in rollouts], dtype=np.float64),
        groups_B=np.asarray(groups, dtype=np.int64),
    )


def micro_batches(
    groups_P: Sequence[Group],
    *,
    normalize_advantages: bool,
    normalization: LossNormalization,
    max_generated_tokens: int,
    capacity: int,
    num_ranks: int = 1,
) -> tuple[MicroBatch, ...]:
    """Every rollout of every group with a signal, packed to `capacity` tokens. Empty where no group has one.

    Their number is a multiple of `num_ranks`, as far as there are sequences for it.
    """
    sequences: list[Sequence_] = []
    for number, group in enumerate(groups_P):
        if group.has_signal:
            advantages_G = group_advantages([r.reward for r in group.rollouts], normalize_advantages)
            pairs = zip(group.rollouts, advantages_G, strict=True)
            sequences += [(group.prompt, rollout, float(advantage), number) for rollout, advantage in pairs]
    if not sequences:
        return ()
    weights = token_weights([len(r.token_ids) for _, r, _, _ in sequences], normalization, max_generated_tokens)
    lengths = [len(p.token_ids) + len(r.token_ids) for p, r, _, _ in sequences]
    return tuple(
        pack([sequences[i] for i in indices], [weights[i] for i in indices])
        for indices in spread(bins(lengths, capacity), lengths, num_ranks)
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
