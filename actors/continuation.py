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
    """`Engine.generate` in parts of at most `part` tokens; None generates in one part. All requests must share one
    `Sampling`."""
    if not requests:
        return engine.generate(requests)  # collective on a sharded model, so a rank without requests calls it too
    limit = requests[0].sampling.max_tokens
    part = limit if part is None else min(part, limit)
    completions_PG = engine.generate([_with_max_tokens(request, part) for request in requests])
    for length in range(part, limit, part):
        unfinished = [(p, g) for p, group in enumerate(completions_PG) for g, c in enumerate(group) if not c.stopped]
        if not unfinished:
            break
        continued = [_continuation(requests[p], g, completions_PG[p][g]) for p, g in unfinished]
        more = engine.generate([_with_max_tokens(request, min(part, limit - length)) for request in continued])
        for (p, g), (rest,) in zip(unfinished, more, strict=True):
            completions_PG[p][g] = _concatenate(completions_PG[p][g], rest)
    return completions_PG


def _with_max_tokens(request: SampleRequest, max_tokens: int) -> SampleRequest:
    return replace(request, sampling=replace(request.sampling, max_tokens=max_tokens))


def _continuation(request: SampleRequest, sample: int, so_far: Completion) -> SampleRequest:
    words = f"{request.seed} {sample} {len(so_far.token_ids)}".encode()
    seed = int.from_bytes(hashlib.sha256(words).digest()[:7])
    ids = (*request.token_ids, *so_far.token_ids.tolist())
    return replace(request, token_ids=ids, num_samples=1, seed=seed)


def _concatenate(first: Completion, rest: Completion) -> Completion:
    return Completion(
        token_ids=np.concatenate([first.token_ids, rest.token_ids]),
        logprobs=np.concatenate([first.logprobs, rest.logprobs]),
        sampling_logprobs=np.concatenate([first.sampling_logprobs, rest.sampling_logprobs]),
        versions=np.concatenate([first.versions, rest.versions]),
        stopped=rest.stopped,
    )
