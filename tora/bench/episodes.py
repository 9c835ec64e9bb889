"""`tora bench episodes`: what tools cost a run. The real loop, pool, worker, episode player and environment processes,
around an engine and a learner that only sleep.

A turn takes the engine the same time however many others it samples, as on a GPU with room in its batch. The run with
tools that take their time is compared with one whose tools answer at once, and a third without any sleep gives what the
code itself costs a turn.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from actors.episode import EpisodePlayer
from actors.worker import RolloutWorker
from tora.bench.rows import write_json
from tora.bench.simulate import WARM_UP, SleepingWorker, timed_run
from tora.config.load import configs_dir
from tora.config.schema import ModelConfig, RolloutConfig, RunConfig, SyncConfig
from tora.environments.processes import EnvironmentProcesses
from tora.environments.template import TurnTemplate
from tora.environments.tools import Parsed, ToolCall, tool_schemas
from tora.environments.turns import Turns
from tora.errors import ConfigError
from tora.rewards.processes import RewardProcesses
from tora.types import Completion, GroupResult, Prompt, SampleRequest, Sampling

_GROUP, _TOKENS, _ROOM = 8, 32, 4096
"""Episodes of a group, tokens of a turn, tokens of an episode."""
_STEPS, _STALENESS = 4, 1
_MOST_GROUPS = 1024
"""Played at once."""


class Waiting:
    """An environment whose tool takes its time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def reset(self, **row: Any) -> None:
        self._number = float(np.random.default_rng().random())  # every group has a signal

    async def look(self) -> str:
        """
        Look around.
        """
        await asyncio.sleep(self._seconds)
        return "a wall"

    def get_reward(self) -> float:
        return self._number


class SleepingEngine:
    def __init__(self, seconds: float, word: int, stop: int) -> None:
        self._seconds, self._ids = seconds, np.array([word] * (_TOKENS - 1) + [stop])

    def generate(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        time.sleep(self._seconds)
        half = np.full(_TOKENS, -0.5, dtype=np.float32)
        one = Completion(self._ids, half, half, np.zeros(_TOKENS, dtype=np.int64), stopped=True)
        return [[one] * request.num_samples for request in requests]

    def close(self) -> None: ...


class PlayingWorker(SleepingWorker):
    """A worker on the pool's event loop, which plays in threads."""

    def __init__(self, worker: RolloutWorker) -> None:
        self._worker, self._version = worker, 0
        self._threads = ThreadPoolExecutor(_MOST_GROUPS)

    async def run_group(self, prompt: Prompt) -> GroupResult:
        play = partial(self._worker.run_group, prompt, prompt.id)
        return await asyncio.get_running_loop().run_in_executor(self._threads, play)

    async def close(self) -> None:
        self._worker.close()


@dataclass(frozen=True, slots=True)
class Measured:
    tool_latency: float
    turn_latency: float
    step_seconds: float
    ms_per_turn: float
    """Wall time of a step over its turns."""


def measure(groups: int, turns: int, turn_latency: float, tool_latency: float, learn_latency: float) -> Measured:
    """A run of steps of `groups` groups, all of them played at once."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(configs_dir() / "bases" / "guess_number")
    factory = {"_component_": "tora.bench.episodes.Waiting", "seconds": tool_latency}
    rewards = [{"_component_": "tora.environments.get_reward"}]
    template = TurnTemplate(tokenizer, tool_schemas(factory, []), [tokenizer.eos_token_id])
    prompt_ids, turns_of = template.prompt("?"), Turns({"": template})

    def make_player() -> EpisodePlayer:
        limits: dict[str, Any] = {"timeout_s": 60.0, "reward_timeout_s": 60.0, "num_processes": 4}
        environments = EnvironmentProcesses(factory, [], rewards, **limits)
        most = turns - 1
        return EpisodePlayer(
            environments, turns_of, lambda _: _look, tokenizer, max_tool_calling_iterations=most, together=False
        )

    def make_worker() -> PlayingWorker:
        word = tokenizer("1")["input_ids"][0]
        worker = RolloutWorker(
            lambda: SleepingEngine(turn_latency, word, tokenizer.eos_token_id),  # pyright: ignore[reportArgumentType]
            partial(RewardProcesses, rewards, timeout_s=60.0, num_processes=1),
            tokenizer,
            sampling=Sampling(_ROOM, stop_token_ids=(tokenizer.eos_token_id,)),
            eval_sampling=Sampling(_ROOM),
            group_size=_GROUP,
            seed=0,
            make_player=make_player,
        )
        return PlayingWorker(worker)

    learner = timed_run(_config(groups), make_worker, lambda i: Prompt(i, prompt_ids, "?", {}), learn_latency)
    seconds = learner.seconds / _STEPS
    return Measured(tool_latency, turn_latency, seconds, 1000 * seconds / (groups * _GROUP * turns))


def _look(text: str) -> Parsed:
    return Parsed("", (ToolCall("look", {}),))


def _config(groups: int) -> RunConfig:
    return RunConfig(
        name="episodes",
        async_rl=True,
        max_staleness=_STALENESS,
        num_steps=WARM_UP + _STEPS,
        batch_size=groups,
        grpo_samples=_GROUP,
        max_generated_tokens=_ROOM,
        micro_batch_tokens=1 << 30,
        model=ModelConfig(path=""),
        dataset={},
        rewards=[],
        environment_factory={},
        rollout=RolloutConfig(num_workers=1, concurrency=groups),
        sync=SyncConfig(canary_every=0),
    )


def run(args: argparse.Namespace) -> int:
    """Run the command. Raises ConfigError if an argument is out of range."""
    for name, minimum in {"groups": 1, "turns": 2, "turn_latency": 0, "tool_latency": 0, "train_share": 0}.items():
        if not minimum <= getattr(args, name) < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {minimum}.")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    learn = args.train_share * args.turns * args.turn_latency
    slow = measure(args.groups, args.turns, args.turn_latency, args.tool_latency, learn)
    fast = measure(args.groups, args.turns, args.turn_latency, 0.0, learn)
    bare = measure(args.groups, args.turns, 0.0, 0.0, 0.0)
    show = partial(Console().print, highlight=False)
    show(
        f"{args.groups * _GROUP} episodes of {args.turns} turns at once, {args.turn_latency:g} s per turn, {learn:g} s "
        f"per training step, max_staleness {_STALENESS}"
    )
    show(f"tools that answer at once: {fast.step_seconds:.2f} s a step")
    ratio = slow.step_seconds / fast.step_seconds
    show(f"tools that take {args.tool_latency:g} s: {slow.step_seconds:.2f} s a step, {ratio:.2f} times as long")
    show(f"without any sleep: {bare.ms_per_turn:.2f} ms a turn, of all code but the model's")
    if args.json is not None:
        write_json([slow, fast, bare], Path(args.json))
    return 0
