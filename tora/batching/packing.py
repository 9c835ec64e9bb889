"""Assign sequences to micro-batches, and lay out their tokens. Pure numpy; shape letters as in `tora.types`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from tora.types import MicroBatch, Prompt, Rollout

TrainSequence = tuple[Prompt, Rollout, float | np.ndarray, int]
"""Prompt, rollout, advantage (of all its tokens, or [S], of each), and group number."""
Layout = dict[str, np.ndarray]
"""`MicroBatch`'s tokens_T, positions_T, prompt_lengths_P, lengths_B, prompt_B, response_N and given_T."""


class Packing(Protocol):
    """How prompts and completions are packed."""

    def images(self, sequences_B: Sequence[TrainSequence]) -> list[bytes]:
        """The images of prompts and completions, in the order of `lay_out`."""
        ...

    def bins(self, sequences: Sequence[TrainSequence], capacity: int, num_ranks: int) -> list[list[int]]:
        """Sequence indices of each micro-batch. A micro-batch has at most `capacity` tokens unless a single sequence
        has more; their number is a multiple of `num_ranks` if there are enough sequences."""
        ...

    def lay_out(self, sequences_B: Sequence[TrainSequence]) -> Layout:
        """The token arrays of one micro-batch."""
        ...


class OwnPrompts:
    """Each sequence is its prompt followed by its completion."""

    def images(self, sequences_B: Sequence[TrainSequence]) -> list[bytes]:
        return [image for prompt, rollout, _, _ in sequences_B for image in (*prompt.images, *rollout.images)]

    def bins(self, sequences: Sequence[TrainSequence], capacity: int, num_ranks: int) -> list[list[int]]:
        lengths = [len(prompt.token_ids) + len(rollout.token_ids) for prompt, rollout, _, _ in sequences]
        return spread(bins(lengths, capacity), lengths, num_ranks)

    def lay_out(self, sequences_B: Sequence[TrainSequence]) -> Layout:
        lengths = np.array([len(prompt.token_ids) + len(rollout.token_ids) for prompt, rollout, _, _ in sequences_B])
        given_T = np.concatenate(
            [mask for prompt, rollout, _, _ in sequences_B for mask in (_all_of(prompt.token_ids), ~rollout.sampled)]
        )
        return _layout(
            tokens_T=_joined(
                ids for prompt, rollout, _, _ in sequences_B for ids in (prompt.token_ids, rollout.token_ids)
            ),
            positions_T=_counted(lengths),
            prompt_lengths_P=np.array([]),
            lengths_B=lengths,
            prompt_B=np.array([]),
            response_N=np.flatnonzero(~given_T) - 1,  # a response token is predicted at the position before it
            given_T=given_T,
        )


class SharedPrompts:
    """All groups' prompts, once each, then all completions. A group too long for one micro-batch is split over several,
    each with the prompt."""

    def images(self, sequences_B: Sequence[TrainSequence]) -> list[bytes]:
        prompts = {number: prompt for prompt, _, _, number in sequences_B}.values()
        shown = [*(prompt.images for prompt in prompts), *(rollout.images for _, rollout, _, _ in sequences_B)]
        return [image for images in shown for image in images]

    def bins(self, sequences: Sequence[TrainSequence], capacity: int, num_ranks: int) -> list[list[int]]:
        groups: dict[int, list[int]] = {}
        for index, (_, _, _, number) in enumerate(sequences):
            groups.setdefault(number, []).append(index)
        prompt_lengths = [len(prompt.token_ids) for prompt, _, _, _ in sequences]
        counts = [len(rollout.token_ids) for _, rollout, _, _ in sequences]

        def cost(block: list[int]) -> int:
            return prompt_lengths[block[0]] + sum(counts[i] for i in block)

        blocks: list[list[int]] = []
        for members in groups.values():
            free = capacity - prompt_lengths[members[0]]
            blocks += [[members[i] for i in part] for part in bins([counts[i] for i in members], free)]
        while True:
            costs = [cost(block) for block in blocks]
            packed = spread(bins(costs, capacity), costs, num_ranks)
            several = [block for block in blocks if len(block) > 1]
            if len(packed) % num_ranks == 0 or not several:
                return [[i for b in indices for i in blocks[b]] for indices in packed]
            largest = max(several, key=cost)  # repeating a prompt costs less than an idle rank
            blocks.remove(largest)
            blocks += halves(largest, counts)

    def lay_out(self, sequences_B: Sequence[TrainSequence]) -> Layout:
        prompts = {number: prompt.token_ids for prompt, _, _, number in sequences_B}
        prompt_index = {number: p for p, number in enumerate(prompts)}
        prompt_lengths = np.array([len(ids) for ids in prompts.values()])
        prompt_B = np.array([prompt_index[number] for _, _, _, number in sequences_B])
        counts = np.array([len(rollout.token_ids) for _, rollout, _, _ in sequences_B])
        given_T = np.concatenate(
            [*map(_all_of, prompts.values()), *(~rollout.sampled for _, rollout, _, _ in sequences_B)]
        )
        prompt_ends, ends = np.cumsum(prompt_lengths), prompt_lengths.sum() + np.cumsum(counts)
        # a prompt's last position predicts the first token of each of its completions
        predictor_T = np.arange(len(given_T)) - 1
        predictor_T[ends - counts] = prompt_ends[prompt_B] - 1
        return _layout(
            tokens_T=_joined([*prompts.values(), *(rollout.token_ids for _, rollout, _, _ in sequences_B)]),
            positions_T=np.concatenate(
                [_counted(prompt_lengths), _counted(counts) + np.repeat(prompt_lengths[prompt_B], counts)]
            ),
            prompt_lengths_P=prompt_lengths,
            lengths_B=counts,
            prompt_B=prompt_B,
            response_N=predictor_T[~given_T],
            given_T=given_T,
        )


def documents(batch: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
    """For each token: its document, [T] int64, and which of its document's completions it belongs to, [T] int64. A
    completion is in the same document as its prompt. The second is -1 for prompts, and wherever a document is a prompt
    and its only completion."""
    if len(batch.prompt_lengths_P) == 0:
        document_T = np.repeat(np.arange(len(batch.lengths_B)), batch.lengths_B)
        return document_T, np.full_like(document_T, -1)
    prompts = np.arange(len(batch.prompt_lengths_P))
    lengths = np.concatenate([batch.prompt_lengths_P, batch.lengths_B])
    branches = np.concatenate([np.full_like(prompts, -1), np.arange(len(batch.lengths_B))])
    return np.repeat(np.concatenate([prompts, batch.prompt_B]), lengths), np.repeat(branches, lengths)


def distinct(shown_I: Sequence[bytes]) -> tuple[tuple[bytes, ...], np.ndarray]:
    """The distinct images, and the index of each of `shown_I` among them, [I] int64."""
    images: list[bytes] = []
    alike: dict[tuple[int, bytes, bytes], list[int]] = {}
    """Indices by length and ends: to hash a whole image takes longer than to send it."""
    image_I = np.empty(len(shown_I), dtype=np.int64)
    for place, image in enumerate(shown_I):
        known = alike.setdefault((len(image), image[:64], image[-64:]), [])
        index = next((i for i in known if images[i] == image), None)
        if index is None:
            index = len(images)
            known.append(index)
            images.append(image)
        image_I[place] = index
    return tuple(images), image_I


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths`, packed first-fit decreasing. No bin exceeds `capacity` unless a single length does."""
    result: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = next((b for b, free in enumerate(room) if free >= lengths[index]), None)
        if fitting is None:
            result.append([])
            room.append(capacity)
            fitting = len(room) - 1
        result[fitting].append(index)
        room[fitting] -= lengths[index]
    return result


def spread(packed: list[list[int]], lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Split the longest bins in two until their number is a multiple of `num_ranks`, or none has two sequences."""
    packed = list(packed)
    while len(packed) % num_ranks and any(len(indices) > 1 for indices in packed):
        longest = max((b for b in packed if len(b) > 1), key=lambda b: sum(lengths[i] for i in b))
        packed.remove(longest)
        packed += halves(longest, lengths)
    return packed


def halves(indices: Sequence[int], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Two parts of about equal total length, by greedy assignment."""
    parts: tuple[list[int], list[int]] = ([], [])
    for index in sorted(indices, key=lambda i: -lengths[i]):
        min(parts, key=lambda part: sum(lengths[i] for i in part)).append(index)
    return parts


def _layout(given_T: np.ndarray, **arrays: np.ndarray) -> Layout:
    return {"given_T": given_T, **{name: array.astype(np.int64, copy=False) for name, array in arrays.items()}}


def _joined(parts: Iterable[Sequence[int] | np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def _counted(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... for each length, end to end."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def _all_of(token_ids: Sequence[int]) -> np.ndarray:
    return np.ones(len(token_ids), dtype=bool)
