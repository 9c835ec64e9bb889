"""`rollout.partial`: generate rollouts in parts, each part under the policy version that is newest when it begins.

Each part is a separate request whose prompt ends with the tokens sampled so far. Log-probs and versions are kept per
token. A rollout is as stale as its oldest token, whose version is at least its slot's, so the staleness bound holds
unchanged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tora.protocols import Engine
from tora.types import Completion, SampleRequest


def generate_in_parts(engine: Engine, requests: Sequence[SampleRequest], part: int | None) -> list[list[Completion]]:
    """`Engine.generate` in parts of at most `part` tokens; None generates in one part."""
    if not requests:
        return engine.generate(requests)  # collective on a sharded model, so a rank without requests calls it too
    limits_P = [request.sampling.max_tokens for request in requests]
    part = max(limits_P) if part is None else part
    completions_PG = engine.generate([_limited(request, part) for request in requests])
    for length in range(part, max(limits_P), part):
        unfinished = [
            (p, g)
            for p, group in enumerate(completions_PG)
            for g, completion in enumerate(group)
            if not completion.stopped and length < limits_P[p]
        ]
        if not unfinished:
            break
        continued = [_continuation(requests[p], g, completions_PG[p][g]) for p, g in unfinished]
        more = engine.generate([_limited(request, part) for request in continued])
        for (p, g), (rest,) in zip(unfinished, more, strict=True):
            completions_PG[p][g] = concatenate(completions_PG[p][g], rest)
    return completions_PG


def _limited(request: SampleRequest, max_tokens: int) -> SampleRequest:
    """The request for at most `max_tokens` tokens."""
    limit = min(request.sampling.max_tokens, max_tokens)
    return replace(request, sampling=replace(request.sampling, max_tokens=limit))


def _continuation(request: SampleRequest, sample: int, so_far: Completion) -> SampleRequest:
    """For what is left of one sample's tokens."""
    count = len(so_far.token_ids)
    sampling = replace(request.sampling, max_tokens=request.sampling.max_tokens - count)
    ids = (*request.token_ids, *so_far.token_ids.tolist())
    seed = derived_seed(request.seed, sample, count)
    return replace(request, token_ids=ids, num_samples=1, seed=seed, sampling=sampling)


def derived_seed(seed: int, *words: int) -> int:
    """A 56-bit seed, different for different words."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, (seed, *words))).encode()).digest()[:7])


def concatenate(first: Completion, rest: Completion) -> Completion:
    """Tokens of one sequence that were sampled one after the other, as one completion."""
    return Completion(
        token_ids=np.concatenate([first.token_ids, rest.token_ids]),
        logprobs=np.concatenate([first.logprobs, rest.logprobs]),
        sampling_logprobs=np.concatenate([first.sampling_logprobs, rest.sampling_logprobs]),
        versions=np.concatenate([first.versions, rest.versions]),
        stopped=rest.stopped,
    )
