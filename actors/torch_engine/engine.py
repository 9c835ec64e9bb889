"""TorchEngine: batched decoding with a key-value cache, on the learner's own modules.

A group's prompt is prefilled once. Finished rows are removed from the batch several at a time, because each removal
copies the cache. Compiled layers stay compiled here, and on a GPU a step may be one CUDA graph.
Shape letters: P prompts, B rows (rollouts), L tokens of a row, T packed prompt tokens, V vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from actors.abort import raise_if_aborted
from actors.torch_engine.cuda_graph import DecodeStep, GraphedStep
from actors.torch_engine.sampling import draw, log_distribution, log_policy
from actors.torch_engine.stop_strings import StopStrings
from tora.adapters.inject import adapters_off, from_wire, num_trained_modules
from tora.adapters.snapshot import digest, unpack
from tora.batching.packing import distinct
from tora.errors import RolloutError, SyncError
from tora.models.attention import CachedAttention, PrefillAttention
from tora.models.base import Decoder
from tora.models.vision.inputs import ImageReader
from tora.models.vision.processor import ImageProcessor
from tora.protocols import Occupancy
from tora.types import (
    Completion,
    LogprobRequest,
    PolicySnapshot,
    SampleRequest,
    Sampling,
    SyncReport,
)

_COMPACT_BELOW = 0.75
"""Finished rows are removed once at most this share of the batch is unfinished. Each removal copies the whole cache."""


@dataclass(frozen=True, slots=True)
class _Packed:
    """Documents end to end, as the model's forward takes them."""

    arguments: dict[str, Any]
    """Keyword arguments of the forward."""
    attend: PrefillAttention
    lengths_P: torch.Tensor
    next_P: torch.Tensor
    """The position that follows each document's last."""


@dataclass(frozen=True, slots=True)
class _Served:
    """A policy version, and its tensors if it may have to be put back."""

    version: int
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


class TorchEngine:
    """Generates with `model` directly. If the learner trains the same object, a snapshot moves no bytes.

    Calls run one at a time, so a snapshot waits for running rollouts.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        device: torch.device,
        shared: bool,
        max_rows: int,
        while_generating: Callable[[], AbstractContextManager[None]] = nullcontext,
        cuda_graphs: bool = False,
        pins: bool = False,
        processor: Callable[[], ImageProcessor] | None = None,
        tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        """`shared`: the learner trains this same model object.

        `max_rows`: rollouts decoded at once; a single request may exceed it. `while_generating`: a context entered for
        each call, in which a sharded model gathers its weights. `cuda_graphs`: only for an unsharded model on a GPU.
        `pins`: whether a version may be pinned, for which the tensors of the newest are kept too.
        `processor`: makes the model's image processor, needed only for prompts with images. `tokenizer`: makes its
        tokenizer, needed only for stop strings.
        """
        self._model, self._device, self._shared, self._max_rows = model, device, shared, max_rows
        self._while_generating = while_generating
        self._read = ImageReader(model, processor, device)
        self._tokenizer = tokenizer and cache(tokenizer)
        self._step: DecodeStep = GraphedStep(self._forward) if cuda_graphs else self._forward
        self._served: _Served | None = None
        self._pinned: _Served | None = None
        self._pins = pins
        self._turn = threading.Lock()

    def install(self, snapshot: PolicySnapshot) -> SyncReport:
        """The report's digest covers the tensors as received, because the model stores them in another form.

        Raises SyncError if the snapshot does not match the model.
        """
        with self._turn:
            return self._install(snapshot)

    def pin(self, snapshot: PolicySnapshot) -> SyncReport:
        """See `Engine`. The model gets these tensors for the time of each call whose requests are pinned."""
        if not self._pins or self._shared:
            raise ValueError("the engine was made without room for a pinned version")
        with self._turn:
            before = self._served
            try:
                report = self._install(snapshot)
                self._pinned = self._served
            finally:
                if before is not None:
                    self._serve(before)
            return report

    def _serve(self, held: _Served) -> None:
        from_wire(self._model, held.tensors)
        self._served = held

    @contextmanager
    def _serving(self, *, pinned: bool) -> Iterator[None]:
        """Within the context the model is the pinned version if `pinned`."""
        if not pinned:
            yield
            return
        newest = self._served
        assert self._pinned is not None and newest is not None, "a version is pinned first"
        self._serve(self._pinned)
        try:
            yield
        finally:
            self._serve(newest)

    def _install(self, snapshot: PolicySnapshot) -> SyncReport:
        start = time.perf_counter()
        if self._shared:
            self._served = _Served(snapshot.version)
            return SyncReport(snapshot.version, 0, time.perf_counter() - start, "", num_trained_modules(self._model))
        tensors = unpack(snapshot)
        try:
            modules = from_wire(self._model, tensors)
        except ValueError as error:
            raise SyncError(str(error)) from error
        self._served = _Served(snapshot.version, tensors if self._pins else {})
        seconds = time.perf_counter() - start
        sha256 = digest(tensors)
        return SyncReport(snapshot.version, snapshot.nbytes, seconds, sha256, modules, stall_seconds=seconds)

    def occupancy(self) -> Occupancy:
        """Always zero: the cache grows with the rollouts, and only `max_rows` bounds it."""
        return Occupancy()

    def sleep(self) -> None:
        """Nothing to free: a cache lasts as long as its call."""

    def close(self) -> None:
        """Nothing to release."""

    @torch.no_grad()
    def generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        """See `Engine`. The requests' `Sampling` may differ in `max_tokens` only."""
        if self._served is None:
            raise RolloutError("the engine was asked to generate before its first snapshot")
        result: list[list[Completion]] = []
        with self._turn, self._while_generating():
            for batch in _batches(requests, self._max_rows):
                raise_if_aborted()
                with self._serving(pinned=batch[0].pinned):
                    result += self._generate_batch(batch)
        return result

    @torch.no_grad()
    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> list[np.ndarray]:
        """See `Engine`."""
        if self._served is None:
            raise RolloutError("the engine was asked for log-probs before its first snapshot")
        off = nullcontext() if adapter else adapters_off(self._model)
        with self._turn, self._while_generating(), torch.compiler.set_stance("force_eager"), off:
            return [self._completion_logprobs(request) for request in requests]

    def _completion_logprobs(self, request: LogprobRequest) -> np.ndarray:
        start = len(request.token_ids)
        x = self._pack([request], [request.completion])
        logits_NV = self._model(**x.arguments, output_fn=lambda hidden: self._model.logits(hidden[0, start - 1 : -1]))
        logprobs_NV = log_distribution(logits_NV, Sampling(max_tokens=1))
        completion_N = torch.tensor(request.completion, device=self._device)
        return logprobs_NV.gather(1, completion_N[:, None])[:, 0].cpu().numpy()

    def _generate_batch(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        assert len({replace(r.sampling, max_tokens=0) for r in requests}) == 1, "one Sampling per call"
        tokens_LB, logprobs_2LB, lengths_B, stopped_B = self._decode(requests)
        completions = [
            self._completion(tokens_LB[:n, b], logprobs_2LB[:, :n, b], bool(stopped_B[b]))
            for b, n in enumerate(lengths_B.tolist())
        ]
        rows = iter(completions)
        return [[next(rows) for _ in range(r.num_samples)] for r in requests]

    def _completion(self, tokens_L: np.ndarray, logprobs_2L: np.ndarray, stopped: bool) -> Completion:
        assert self._served is not None
        versions_L = np.full(len(tokens_L), self._served.version, dtype=np.int64)
        policy_L, sampling_L = logprobs_2L.copy()
        return Completion(tokens_L.copy(), policy_L, sampling_L, versions_L, stopped)

    def _forward(self, token_B: torch.Tensor, cache: CachedAttention) -> torch.Tensor:
        return self._model(
            token_B[:, None],
            positions=cache.positions_B[:, None],
            attend=cache,
            output_fn=lambda hidden: self._model.logits(hidden[:, 0]),
        )

    def _prefill(self, requests: Sequence[SampleRequest]) -> tuple[CachedAttention, torch.Tensor]:
        """A cache with one row per rollout, and the logits [B, V] of each rollout's first token."""
        x = self._pack(requests, [()] * len(requests))
        samples_P = torch.tensor([r.num_samples for r in requests], device=self._device)
        rows_B = torch.arange(len(requests), device=self._device).repeat_interleave(samples_P)
        last_P = x.lengths_P.cumsum(0) - 1
        with torch.compiler.set_stance("force_eager"):  # runs once per call: not worth compiling
            logits_PV = self._model(**x.arguments, output_fn=lambda hidden: self._model.logits(hidden[0, last_P]))
        cache = CachedAttention(x.attend, x.lengths_P[rows_B], rows_B, x.next_P[rows_B])
        return cache, logits_PV[rows_B]

    def _pack(self, requests: Sequence[SampleRequest | LogprobRequest], tails: Sequence[tuple[int, ...]]) -> _Packed:
        """Prompts end to end, each followed by its tail."""
        ids_P = [request.token_ids + tail for request, tail in zip(requests, tails, strict=True)]
        lengths_P = np.array([len(ids) for ids in ids_P])
        tokens_T, positions_T = np.concatenate(ids_P), np.concatenate([np.arange(n) for n in lengths_P])
        next_P, positions, seen = lengths_P, positions_T, None
        images, image_I = distinct([image for request in requests for image in request.images])
        if images:
            given = [
                np.concatenate([self._read.shows_image(request.token_ids, request.images), [False] * len(tail)])
                for request, tail in zip(requests, tails, strict=True)
            ]
            seen, positions = self._read(
                images,
                tokens_T=tokens_T,
                positions_T=positions_T,
                document_T=np.repeat(np.arange(len(requests)), lengths_P),
                given_T=np.concatenate(given).astype(bool),
                image_I=image_I,
            )
            next_P = np.atleast_2d(positions)[:, np.cumsum(lengths_P) - 1].max(0) + 1
        lengths, next_, tokens, where = (
            torch.from_numpy(x).to(self._device) for x in (lengths_P, next_P, tokens_T, positions)
        )
        attend = PrefillAttention(lengths)
        arguments = {"tokens": tokens[None], "positions": where.unsqueeze(-2), "attend": attend, "images": seen}
        return _Packed(arguments, attend, lengths, next_)

    def _decode(self, requests: Sequence[SampleRequest]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [L, B] int64; their log-probs [2, L, B] float32, under the policy and under the distribution they are
        drawn from; lengths [B]; and whether each row ended with a stop token or string [B]. Entries past a row's length
        are undefined."""
        sampling = requests[0].sampling
        max_tokens = max(r.sampling.max_tokens for r in requests)
        limit_B = torch.tensor([r.sampling.max_tokens for r in requests for _ in range(r.num_samples)]).to(self._device)
        uniform_LB = _random_numbers(requests, max_tokens).to(self._device)
        cache, logits_BV = self._prefill(requests)
        stop = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=self._device)
        tokens_LB = torch.zeros_like(uniform_LB, dtype=torch.int64)
        logprobs_2LB = torch.zeros(2, *uniform_LB.shape, device=self._device)
        seen_BV = self._seen(requests, logits_BV) if sampling.repetition_penalty != 1 else None
        strings = self._stop_strings(requests) if sampling.stop else None
        lengths_B = torch.zeros_like(tokens_LB[0])
        stopped_B = torch.zeros_like(lengths_B, dtype=torch.bool)
        rows_B = torch.arange(len(lengths_B), device=self._device)  # original numbers of the rows still in the batch
        alive_B = torch.ones_like(rows_B, dtype=torch.bool)
        for step in range(max_tokens):
            raise_if_aborted()
            drawn_BV = log_distribution(logits_BV, sampling, seen_BV)
            token_B = draw(drawn_BV, uniform_LB[step, rows_B], greedy=sampling.temperature == 0)
            tokens_LB[step, rows_B] = token_B
            policy_BV = log_policy(logits_BV, sampling.temperature) if sampling.reshapes else drawn_BV
            for which, logprobs_BV in enumerate((policy_BV, drawn_BV)):
                logprobs_2LB[which, step, rows_B] = logprobs_BV.gather(1, token_B[:, None])[:, 0]
            if seen_BV is not None:
                seen_BV.scatter_(1, token_B[:, None], True)
            lengths_B[rows_B] += alive_B
            ends_B = torch.isin(token_B, stop)
            if strings is not None:
                ends_B |= torch.tensor(strings.step(rows_B.tolist(), token_B.tolist()), device=self._device)
            stopped_B[rows_B] |= alive_B & ends_B
            alive_B = alive_B & ~ends_B & (step + 1 < limit_B[rows_B])
            num_alive = int(alive_B.sum())
            if num_alive == 0 or step + 1 == max_tokens:
                break
            if num_alive <= _COMPACT_BELOW * len(rows_B):
                remaining = alive_B.nonzero()[:, 0]
                cache.keep(remaining)
                rows_B, token_B, alive_B = rows_B[remaining], token_B[remaining], alive_B[remaining]
                seen_BV = None if seen_BV is None else seen_BV[remaining]
            logits_BV = self._step(token_B, cache)
            cache.advance()
        return tokens_LB.cpu().numpy(), logprobs_2LB.cpu().numpy(), lengths_B.cpu().numpy(), stopped_B.cpu().numpy()

    def _stop_strings(self, requests: Sequence[SampleRequest]) -> StopStrings:
        assert self._tokenizer is not None, "stop strings need a tokenizer"
        return StopStrings(self._tokenizer(), requests)

    def _seen(self, requests: Sequence[SampleRequest], logits_BV: torch.Tensor) -> torch.Tensor:
        """[B, V] bool: which tokens each row's prompt contains."""
        seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
        row = 0
        for request in requests:
            seen_BV[row : row + request.num_samples, list(request.token_ids)] = True
            row += request.num_samples
        return seen_BV


def _batches(requests: Sequence[SampleRequest], max_rows: int) -> list[list[SampleRequest]]:
    """Consecutive requests grouped so that each group asks for at most `max_rows` samples, of one policy."""
    batches: list[list[SampleRequest]] = []
    rows = max_rows
    for request in requests:
        if rows + request.num_samples > max_rows or not batches or batches[-1][0].pinned != request.pinned:
            batches.append([])
            rows = 0
        batches[-1].append(request)
        rows += request.num_samples
    return batches


def _random_numbers(requests: Sequence[SampleRequest], max_tokens: int) -> torch.Tensor:
    """[max_tokens, B] float64 in [0, 1): each request's from its own seed, and on the CPU so that all devices agree."""
    columns = []
    for request in requests:
        generator = torch.Generator().manual_seed(request.seed)
        columns.append(torch.rand(max_tokens, request.num_samples, generator=generator, dtype=torch.float64))
    return torch.cat(columns, 1)
