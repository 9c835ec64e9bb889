"""Small working implementations of `tora.protocols`, and data for tests. No mocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tora.protocols import Occupancy
from tora.types import (
    Group,
    GroupResult,
    LogprobRequest,
    Prompt,
    Rollout,
    SnapshotRef,
    StopReason,
    SyncReport,
)


def make_prompt(prompt_id: int, length: int = 3) -> Prompt:
    return Prompt(prompt_id, tuple(range(3, 3 + length)), f"question {prompt_id}", {"answer": str(prompt_id)})


def make_rollout(
    tokens: Sequence[int] | np.ndarray,
    reward: float,
    version: int = 0,
    logprob: float = -1.0,
    sampled: Sequence[bool] | None = None,
) -> Rollout:
    """`sampled`: which tokens the policy sampled; all of them if it is None."""
    drawn = np.ones(len(tokens), dtype=bool) if sampled is None else np.asarray(sampled)
    return Rollout(
        token_ids=np.asarray(tokens, dtype=np.int64),
        sampled=drawn,
        actor_logprobs=np.full(drawn.sum(), logprob, dtype=np.float32),
        versions=np.full(drawn.sum(), version, dtype=np.int64),
        stop_reason=StopReason.STOP,
        text=" ".join(map(str, tokens)),
        reward=reward,
        reward_parts={"fake": reward},
    )


def make_group(prompt: Prompt, rewards: Sequence[float], version: int = 0, length: int = 4) -> Group:
    return make_result(rewards, version, length).with_prompt(prompt)


def make_result(rewards: Sequence[float], version: int = 0, length: int = 4) -> GroupResult:
    return GroupResult(tuple(make_rollout(range(10, 10 + length + i), r, version) for i, r in enumerate(rewards)))


def make_snapshot(version: int) -> SnapshotRef:
    return SnapshotRef(version, None)


class FakeWorker:
    """A rollout worker that sleeps, then answers under the version that was newest when the group began."""

    def __init__(
        self,
        latency: Callable[[], float] = lambda: 0.0,
        rewards: Callable[[Prompt], Sequence[float]] = lambda prompt: [0.0, 1.0],
    ) -> None:
        self.latency, self.rewards = latency, rewards
        self.version = -1
        self.prompt_ids: list[int] = []
        self.closed = False

    async def start(self, limit_s: float) -> None: ...

    async def run_group(self, prompt: Prompt) -> GroupResult:
        assert self.version >= 0, "asked to generate before the first snapshot"
        self.prompt_ids.append(prompt.id)
        version = self.version
        await asyncio.sleep(self.latency())
        return make_result(self.rewards(prompt), version)

    async def evaluate(self, prompts: Sequence[Prompt], pinned: Any = None) -> list[GroupResult]:
        version = self.version if pinned is None else pinned.version
        await asyncio.sleep(self.latency())
        return [make_result([float(p.id % 2)], version) for p in prompts]

    async def logprobs(self, requests: Sequence[LogprobRequest], adapter: bool) -> list[np.ndarray]:
        return [np.full(len(r.completion), -1.0 - adapter, np.float32) for r in requests]

    async def forward(self, snapshot: Any) -> SyncReport:
        await asyncio.sleep(self.latency())
        self.version = snapshot.version
        return SyncReport(snapshot.version, 8, 0.0, "", 1)

    async def occupancy(self) -> Occupancy:
        return Occupancy()

    async def close(self) -> None:
        self.closed = True

    def keep_log(self) -> str:
        return ""

    def kill(self) -> None:
        self.closed = True
