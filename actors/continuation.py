"""Rollouts cut after a number of tokens and continued under the newest policy version: `rollout.partial`.

A continuation is a request of its own, whose prompt ends with what was sampled so far. Its tokens are of the version
that is newest when it begins; log-probs and versions are kept per token. A rollout is as stale as its oldest token, of
the version that served when the buffer granted its slot: cutting changes no bound.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tora.protocols import Engine
from tora.types import Completion, SampleRequest


def generate_in_parts(engine: Engine, requests: Sequence[SampleRequest], part: int | None) -> list[list[Completion]]:
    """`Engine.generate`, in parts of at most `part` tokens; None is one part. All requests share one `Sampling`."""
    if not requests:
        return engine.generate(requests)  # on a model that ranks share, a call that all must make
    limit = requests[0].sampling.max_tokens
    part = limit if part is None else min(part, limit)
    done = engine.generate([_limited(request, part) for request in requests])
    for length in range(part, limit, part):
        going = [(p, g) for p, group in enumerate(done) for g, c in enumerate(group) if not c.stopped]
        if not going:
            break
        more = engine.generate(
            [_limited(_continuation(requests[p], g, done[p][g]), min(part, limit - length)) for p, g in going]
        )
        for (p, g), (rest,) in zip(going, more, strict=True):
            done[p][g] = _joined(done[p][g], rest)
    return done


def _limited(request: SampleRequest, max_tokens: int) -> SampleRequest:
    return replace(request, sampling=replace(request.sampling, max_tokens=max_tokens))


def _continuation(request: SampleRequest, sample: int, so_far: Completion) -> SampleRequest:
    words = f"{request.seed} {sample} {len(so_far.token_ids)}".encode()
    seed = int.from_bytes(hashlib.sha256(words).digest()[:7])
    ids = (*request.token_ids, *so_far.token_ids.tolist())
    return replace(request, token_ids=ids, num_samples=1, seed=seed)


def _joined(first: Completion, rest: Completion) -> Completion:
    return Completion(
        token_ids=np.concatenate([first.token_ids, rest.token_ids]),
        logprobs=np.concatenate([first.logprobs, rest.logprobs]),
        sampling_logprobs=np.concatenate([first.sampling_logprobs, rest.sampling_logprobs]),
        versions=np.concatenate([first.versions, rest.versions]),
        stopped=rest.stopped,
    )
