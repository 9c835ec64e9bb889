"""Groups of rollouts -> packed micro-batches. Pure numpy; shape letters as in `tora.types`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from tora.batching.advantage import advantages
from tora.batching.packing import OwnPrompts, Packing, SharedPrompts, TrainSequence, distinct
from tora.batching.turns import rewards_differ, turn_advantages
from tora.config.schema import Advantage, Credit, LossNormalization
from tora.types import Group, MicroBatch

Regularizer = Literal["none", "loss", "reward"]
"""What else acts on sequences besides their rewards: nothing, a term of the loss, or a penalty on the reward."""


def token_weights(
    lengths_B: Sequence[int],
    normalization: LossNormalization,
    max_generated_tokens: int,
    asked: float | None = None,
    *,
    is_part: bool = False,
) -> list[float]:
    """The weight in the loss of each token of sequence b, for each of B sequences with `lengths_B` response tokens.

    - `token`: 1 / (all tokens), the mean over tokens.
    - `sequence`: 1 / (B · length of b), the mean over each sequence's tokens, then over sequences.
    - `constant`: 1 / (`asked` · `max_generated_tokens`), Dr. GRPO's (Liu et al. 2025, arXiv:2503.20783), `asked` being
      the number of sequences that were asked for, or B if it is None. A token's weight depends on nothing that was
      sampled: neither on the length of its completion nor on how many others are kept.

    Except for `constant`, the weights of all tokens sum to 1. With `is_part` the sequences are some of the
    step's. B and the number of all tokens are not known then: `asked` and `asked` · `max_generated_tokens` stand for
    them, and in the end the learner divides by the sum of the weights.
    """
    count = asked or len(lengths_B)
    if normalization == "constant" or (is_part and normalization == "token"):
        return [1.0 / (count * max_generated_tokens)] * len(lengths_B)
    if normalization == "token":
        return [1.0 / sum(lengths_B)] * len(lengths_B)
    return [1.0 / ((count if is_part else len(lengths_B)) * n) for n in lengths_B]


def pack(
    packing: Packing, sequences_B: Sequence[TrainSequence], weights_B: Sequence[float], mini_batch: int = 0
) -> MicroBatch:
    """One micro-batch of the given sequences, whose response tokens have the weights `weights_B`."""
    _, rollouts, advantages_B, groups_B = zip(*sequences_B, strict=True)
    counts = [rollout.num_sampled for rollout in rollouts]
    tokens, sampled = np.concatenate([r.token_ids for r in rollouts]), np.concatenate([r.sampled for r in rollouts])
    images, image_I = distinct(packing.images(sequences_B))
    return MicroBatch(
        **packing.lay_out(sequences_B),
        targets_N=tokens[sampled].astype(np.int64),
        sequence_N=np.repeat(np.arange(len(counts)), counts).astype(np.int64),
        actor_logprobs_N=np.concatenate([r.actor_logprobs for r in rollouts]).astype(np.float32),
        versions_N=np.concatenate([r.versions for r in rollouts]).astype(np.int64),
        advantages_N=np.concatenate([np.full(n, a, np.float32) for a, n in zip(advantages_B, counts, strict=True)]),
        weights_N=np.repeat(weights_B, counts).astype(np.float32),
        rewards_B=np.asarray([r.reward for r in rollouts], dtype=np.float64),
        groups_B=np.asarray(groups_B, dtype=np.int64),
        image_I=image_I,
        images=images,
        mini_batch=mini_batch,
    )


_LEAST_SAVED = 0.2
"""Share of tokens. Attention over a shared prompt needs a mask and cannot skip what causality hides, so it is slower a
token: on a CPU saving 0.1 of the tokens took 0.96 to 1.04 of the speed, and saving 0.2 brought 1.03 to 1.09."""


def _saves_enough(groups_P: Sequence[Group]) -> bool:
    """Whether one copy of each prompt for its group saves enough tokens."""
    repeated = sum(len(g.prompt.token_ids) * (len(g.rollouts) - 1) for g in groups_P)
    total = sum(len(g.prompt.token_ids) + len(r.token_ids) for g in groups_P for r in g.rollouts)
    return repeated > _LEAST_SAVED * total


def micro_batches(
    groups_P: Sequence[Group],
    *,
    normalize_advantages: bool,
    normalization: LossNormalization,
    max_generated_tokens: int,
    capacity: int,
    num_ranks: int = 1,
    share_prefix: bool | None = False,
    advantage: Advantage = "grpo",
    credit: Credit = "episode",
    asked: int | None = None,
    regularizer: Regularizer = "none",
    mask_truncated: bool = False,
    num_mini_batches: int = 1,
    seed: Sequence[int] = (0,),
    is_part: bool = False,
    first: int = 0,
) -> tuple[MicroBatch, ...]:
    """The rollouts to train on, packed into micro-batches of up to `capacity` tokens.

    The number of micro-batches of a mini-batch is a multiple of `num_ranks` if there are enough sequences; 0 if no
    group is trained.
    `share_prefix`: include a group's prompt once per micro-batch instead of once per rollout; None: if that saves
    enough.
    `asked`: rollouts that the config asks for in a step; see `token_weights`.
    `regularizer`: without one, groups without `rewards_differ` are left out; with one they stay, with advantages
    of 0.
    `mask_truncated`: truncated rollouts count in their group's advantages only. They are left
    out, or stay with a weight of 0 if the advantages are still to be penalized.
    `num_mini_batches`, `seed`: see `mini_batches`. A mini-batch's token weights are those of its sequences alone.
    `is_part`: see `token_weights`; `first` is then the number of groups in the step's parts before this one.
    """
    shared = _saves_enough(groups_P) if share_prefix is None else share_prefix
    packing: Packing = SharedPrompts() if shared else OwnPrompts()
    rollouts = [(number, rollout) for number, group in enumerate(groups_P, first) for rollout in group.rollouts]
    rewards_B = np.array([rollout.reward for _, rollout in rollouts], dtype=np.float64)
    groups_B = np.array([number for number, _ in rollouts], dtype=np.int64)
    lengths_B = np.array([rollout.num_sampled for _, rollout in rollouts], dtype=np.int64)
    advantages_B: Sequence[float | np.ndarray] = (
        advantages(rewards_B, groups_B, lengths_B, advantage, normalize_advantages).tolist()
        if credit == "episode"
        else [a for group in groups_P for a in turn_advantages(group.rollouts, advantage, normalize_advantages)]
    )
    members: dict[int, list[TrainSequence]] = {}
    for (number, rollout), advantage_b in zip(rollouts, advantages_B, strict=True):
        members.setdefault(number, []).append((groups_P[number - first].prompt, rollout, advantage_b, number))

    def masked(sequence: TrainSequence) -> bool:
        return mask_truncated and sequence[1].truncated

    trained = [
        number
        for number, sequences in members.items()
        if (regularizer != "none" or rewards_differ([rollout for _, rollout, _, _ in sequences], credit))
        and not all(map(masked, sequences))
    ]
    result: list[MicroBatch] = []
    for index, numbers in enumerate(mini_batches(trained, num_mini_batches, seed)):
        sequences = [sequence for number in numbers for sequence in members[number]]
        if regularizer != "reward":
            sequences = [sequence for sequence in sequences if not masked(sequence)]
        lengths = [sequence[1].num_sampled for sequence in sequences if not masked(sequence)]
        of_each = asked and asked / num_mini_batches
        counted = iter(token_weights(lengths, normalization, max_generated_tokens, of_each, is_part=is_part))
        weights = [0.0 if masked(sequence) else next(counted) for sequence in sequences]
        result += [
            pack(packing, [sequences[i] for i in indices], [weights[i] for i in indices], index)
            for indices in packing.bins(sequences, capacity, num_ranks)
        ]
    return tuple(result)


def mini_batches(groups: Sequence[int], count: int, seed: Sequence[int]) -> list[list[int]]:
    """Groups dealt to `count` mini-batches at random by `seed`, in numbers that differ by at most 1; fewer mini-batches
    if there are fewer groups. A single one keeps their order."""
    count = min(count, len(groups))
    if count <= 1:
        return [list(groups)] * count
    order = np.random.default_rng(list(seed)).permutation(len(groups))
    return [[groups[i] for i in part] for part in np.array_split(order, count)]


def penalize(
    micro_batches: Sequence[MicroBatch], penalties_B: np.ndarray, advantage: Advantage, normalize_advantages: bool
) -> list[MicroBatch]:
    """The same micro-batches with the advantages of rewards minus `penalties_B`, [B] in the order of their sequences.

    Pass all micro-batches of the step, since an advantage depends on the rewards of the entire group.
    """
    rewards_B = np.concatenate([m.rewards_B for m in micro_batches]) - penalties_B
    groups_B = np.concatenate([m.groups_B for m in micro_batches])
    counts = [np.bincount(m.sequence_N, minlength=len(m.lengths_B)) for m in micro_batches]
    advantages_B = advantages(rewards_B, groups_B, np.concatenate(counts), advantage, normalize_advantages)
    parts = np.split(advantages_B.astype(np.float32), np.cumsum([len(m.lengths_B) for m in micro_batches])[:-1])
    return [replace(m, advantages_N=part[m.sequence_N]) for m, part in zip(micro_batches, parts, strict=True)]
