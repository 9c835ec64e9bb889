"""LocalRollouts: one worker in this process, or one per rank. Generation and training alternate.

An engine that has generated sleeps until it is needed again, so that the learner can use its memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from actors.group_filter import SignalFilter
from actors.prompt_cursor import PromptCursor, made_at_once
from actors.rollout_metrics import sync_metrics
from actors.worker import RolloutWorker
from tora.batching.train_batch import make_batch
from tora.config.schema import RunConfig
from tora.distributed.process_group import World
from tora.types import (
    Group,
    GroupResult,
    LogprobRequest,
    Metrics,
    PolicySnapshot,
    Prompt,
    RolloutState,
    TrainBatch,
)

_LEAST_AT_ONCE = 128
"""Prompts of an evaluation that each rank's engine gets at once, or more if it has room for more."""


class LocalRollouts:
    def __init__(
        self,
        cfg: RunConfig,
        worker: RolloutWorker,
        prompt_at: Callable[[int], Prompt],
        eval_prompts: Sequence[Prompt],
        state: RolloutState,
        world: World,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        """`prompt_at` is the prompt stream. `state` is from `state()` when the run was interrupted. `stop_requested`:
        whether this rank was asked to stop, which ends evaluations.

        Every rank reads the same stream and generates its share of each round; all ranks then have all groups.
        """
        self._cfg, self._worker, self._eval_prompts, self._world = cfg, worker, eval_prompts, world
        self._ask, self._stop_requested = made_at_once(prompt_at), stop_requested
        self._cursor = PromptCursor(self._ask, state)
        self._begun: list[int] = []
        """Ids of the prompts of a batch that is not finished."""
        self._filter = SignalFilter(cfg)

    def next_batch(self, step: int, stop_requested: Callable[[], bool]) -> TrainBatch:
        """Generate until `batch_size` groups carry a signal or refills run out. A stop takes effect after the step."""
        start = time.perf_counter()
        groups: list[Group] = []
        while len(groups) < self._cfg.batch_size:
            prompts = [self._next_prompt() for _ in range(self._cfg.batch_size - len(groups))]
            groups += [g for g in self._on_all_ranks(self._worker.run_groups, prompts) if self._filter.admit(g)]
        self._worker.sleep()
        generated, drops = self._filter.drain()
        batch = make_batch(self._cfg, groups, generated, drops, step, time.perf_counter() - start)
        batch.metrics["rollout/prompts_dropped"] = float(self._cursor.take_dropped())
        self._begun.clear()
        return batch

    def _next_prompt(self) -> Prompt:
        prompt = self._cursor.take()
        assert prompt is not None, "it is made when it is asked for"
        self._begun.append(prompt.id)
        return prompt

    def publish(self, snapshot: PolicySnapshot, *, generates: bool = True) -> Metrics:
        start = time.perf_counter()
        report = self._worker.forward(snapshot)
        return sync_metrics([report], time.perf_counter() - start)

    def start_evaluation(self, *, pinned: bool) -> None:
        """Nothing yet: see `evaluated`."""
        assert not pinned, "one worker in this process either trains or evaluates"

    def evaluated(self, *, wait: bool) -> list[Group] | None:
        """In parts that fill the engines, between which a stop takes effect."""
        groups: list[Group] = []
        at_once = self._world.size * max(_LEAST_AT_ONCE, self._cfg.rollout.concurrency * self._cfg.grpo_samples)
        for start in range(0, len(self._eval_prompts), at_once):
            if self._world.any(self._stop_requested()):
                return None
            groups += self._on_all_ranks(self._worker.evaluate, self._eval_prompts[start : start + at_once])
        self._worker.sleep()
        return groups

    def _on_all_ranks(
        self, answer: Callable[[Sequence[Prompt]], list[GroupResult]], prompts: Sequence[Prompt]
    ) -> list[Group]:
        """Each rank answers its share of the prompts. All ranks get all groups, in the prompts' order."""
        results = self._world.collect(answer(self._world.share(prompts)))
        return [result.with_prompt(prompt) for result, prompt in zip(results, prompts, strict=True)]

    def logprobs(self, requests: Sequence[LogprobRequest], *, adapter: bool) -> dict[int, list[np.ndarray]]:
        answers = {self._world.rank: self._worker.logprobs(requests, adapter=adapter)}
        self._worker.sleep()
        return answers

    def state(self) -> RolloutState:
        return self._cursor.state(self._begun)

    def rewind(self, state: RolloutState, version: int) -> None:
        self._cursor, self._begun = PromptCursor(self._ask, state), []

    def close(self) -> None:
        self._worker.close()
