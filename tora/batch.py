"""Groups -> packed micro-batches. Pure numpy, and the only place that lays tokens out for the learner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from tora.advantage import group_advantages
from tora.types import Group, MicroBatch, Prompt, Rollout

Sequence_ = tuple[Prompt, Rollout, float]
"""A rollout with its prompt and its advantage."""


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


def token_weights(lengths_B: Sequence[int], normalization: Literal["token", "sequence"]) -> list[float]:
    """The weight of each token of sequence b in the loss; over all tokens they sum to 1."""
    if normalization == "token":
        return [1.0 / sum(lengths_B)] * len(lengths_B)
    return [1.0 / (len(lengths_B) * n) for n in lengths_B]


def pack(sequences_B: Sequence[Sequence_], weights_B: Sequence[float]) -> MicroBatch:
    """Lay prompt and completion of each sequence end to end."""
    prompt_lengths = [len(prompt.token_ids) for prompt, _, _ in sequences_B]
    lengths = [n + len(rollout.token_ids) for n, (_, rollout, _) in zip(prompt_lengths, sequences_B, strict=True)]
    starts = np.cumsum([0, *lengths[:-1]])
    counts = [len(rollout.token_ids) for _, rollout, _ in sequences_B]
    tokens = [np.concatenate([p.token_ids, r.token_ids]) for p, r, _ in sequences_B]
    # the position before a response token is the one that predicts it
    response = [s + n - 1 + np.arange(c) for s, n, c in zip(starts, prompt_lengths, counts, strict=True)]
    return MicroBatch(
        tokens_T=np.concatenate(tokens).astype(np.int64),
        lengths_B=np.asarray(lengths, dtype=np.int64),
        response_N=np.concatenate(response).astype(np.int64),
        targets_N=np.concatenate([r.token_ids for _, r, _ in sequences_B]).astype(np.int64),
        sequence_N=np.repeat(np.arange(len(counts)), counts).astype(np.int64),
        actor_logprobs_N=np.concatenate([r.actor_logprobs for _, r, _ in sequences_B]).astype(np.float32),
        versions_N=np.concatenate([r.versions for _, r, _ in sequences_B]).astype(np.int64),
        advantages_N=np.repeat([a for _, _, a in sequences_B], counts).astype(np.float32),
        weights_N=np.repeat(weights_B, counts).astype(np.float32),
    )


def micro_batches(
    groups_P: Sequence[Group],
    *,
    normalize_advantages: bool,
    normalization: Literal["token", "sequence"],
    capacity: int,
    num_ranks: int = 1,
) -> tuple[MicroBatch, ...]:
    """Every rollout of every group with a signal, packed to `capacity` tokens. Empty where no group has one.

    Their number is a multiple of `num_ranks`, as far as there are sequences for it.
    """
    sequences: list[Sequence_] = []
    for group in groups_P:
        if group.has_signal:
            advantages_G = group_advantages([r.reward for r in group.rollouts], normalize_advantages)
            sequences += [(group.prompt, r, float(a)) for r, a in zip(group.rollouts, advantages_G, strict=True)]
    if not sequences:
        return ()
    weights = token_weights([len(r.token_ids) for _, r, _ in sequences], normalization)
    lengths = [len(p.token_ids) + len(r.token_ids) for p, r, _ in sequences]
    return tuple(
        pack([sequences[i] for i in indices], [weights[i] for i in indices])
        for indices in spread(bins(lengths, capacity), lengths, num_ranks)
    )
