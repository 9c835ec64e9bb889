"""Workers for evaluations alone, beside those of the pool."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeWorker, make_snapshot
from pools import QUICK, config, evaluate, next_batch, running

from tora.config.load import dump_yaml, load_config
from tora.config.schema import EvalConfig, RunConfig
from tora.errors import ConfigError, SyncError, WorkerLost
from tora.launch.eval_workers import with_eval_workers
from tora.run.target import find
from tora.types import GroupResult, Prompt


class Counting(FakeWorker):
    """Counts what it is asked for. Its calls of an evaluation take `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds, self.num_groups, self.evaluated, self.installed = seconds, 0, list[int](), list[int]()

    async def run_group(self, prompt: Prompt) -> GroupResult:
        self.num_groups += 1
        return await super().run_group(prompt)

    async def forward(self, snapshot: Any) -> Any:
        self.installed.append(snapshot.version)
        return await super().forward(snapshot)

    async def evaluate(self, prompts: Sequence[Prompt], pinned: Any = None) -> list[GroupResult]:
        await asyncio.sleep(self.seconds)
        self.evaluated += [prompt.id for prompt in prompts]
        return await super().evaluate(prompts, pinned)


def with_own(count: int = 1, **changes: Any) -> RunConfig:
    return replace(config(1, **changes), eval=EvalConfig(dataset={}, num_workers=count))


def train_until_up(rollouts: Any, own: Sequence[Counting]) -> int:
    """The next step."""
    for step in itertools.count():
        if all(worker.installed for worker in own):
            return step
        next_batch(rollouts, step)
        rollouts.publish(make_snapshot(step + 1))
    raise AssertionError


def train_until_evaluated(rollouts: Any, step: int) -> tuple[list[Any], int]:
    """Its groups, and the next step."""
    while (groups := rollouts.evaluated(wait=False)) is None:
        next_batch(rollouts, step)
        rollouts.publish(make_snapshot(step := step + 1))
    return groups, step


def test_they_do_all_of_it_while_training_goes_on_and_nothing_else() -> None:
    workers, own = [Counting(), Counting()], [Counting(0.02), Counting(0.02)]
    with running(with_own(2), iter(workers).__next__, make_evaluator=iter(own).__next__, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        step = train_until_up(rollouts, own)
        for _ in range(3):
            rollouts.start_evaluation(pinned=True)
            pinned = step
            groups, step = train_until_evaluated(rollouts, step)
            assert [group.prompt.id for group in groups] == list(range(5))
            assert [group.version for group in groups] == [pinned] * 5
        assert next_batch(rollouts, step).metrics["rollout/workers"] == 2
        assert set(rollouts.logprobs([], adapter=True)) == {0, 1}, "the canary has nothing to ask them"
    assert [len(worker.evaluated) for worker in workers] == [0, 0]
    assert all(worker.evaluated for worker in own) and not any(worker.num_groups for worker in own)
    assert [len(worker.installed) for worker in own] == [1, 1], "a version travels with the calls"
    assert all(worker.closed for worker in own)


def test_the_pools_workers_help_once_it_is_awaited() -> None:
    workers, own = [Counting()], [Counting(0.5)]
    cfg = with_own(workers=1)
    cfg.rollout.engine, cfg.grpo_samples = "vllm", 1  # a call for each prompt
    with running(cfg, iter(workers).__next__, make_evaluator=iter(own).__next__, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        step = train_until_up(rollouts, own)
        rollouts.start_evaluation(pinned=True)
        next_batch(rollouts, step)
        assert not workers[0].evaluated
        groups = rollouts.evaluated(wait=True)
        assert groups is not None and len(groups) == 5
    assert workers[0].evaluated and own[0].evaluated


def test_without_one_that_is_up_the_pools_workers_evaluate() -> None:
    class Never(Counting):
        async def start(self, limit_s: float) -> None:
            raise WorkerLost("no memory is left")

    workers = [Counting()]
    with running(with_own(workers=1), iter(workers).__next__, make_evaluator=Never, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        rollouts.start_evaluation(pinned=True)
        groups, step = train_until_evaluated(rollouts, 0)
        assert [group.version for group in groups] == [0] * 5 and sorted(workers[0].evaluated) == list(range(5))
        assert next_batch(rollouts, step).metrics["rollout/workers_lost"] == 0, "no group was"


def test_a_call_of_one_that_is_lost_runs_again(caplog: pytest.LogCaptureFixture) -> None:
    class Dying(Counting):
        async def evaluate(self, prompts: Sequence[Prompt], pinned: Any = None) -> list[GroupResult]:
            raise WorkerLost("killed")

    dying = Dying()
    made = itertools.chain([dying], iter(Counting, None))
    with running(with_own(), Counting, make_evaluator=made.__next__, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        train_until_up(rollouts, [dying])
        groups = evaluate(rollouts, pinned=True)
        assert groups is not None and [group.prompt.id for group in groups] == list(range(5))
    assert "evaluation worker 0 is lost (killed)" in caplog.text


def test_a_wrong_snapshot_ends_the_run() -> None:
    class Wrong(Counting):
        async def evaluate(self, prompts: Sequence[Prompt], pinned: Any = None) -> list[GroupResult]:
            raise SyncError("half of it")

    own = Wrong()
    with running(with_own(), Counting, make_evaluator=lambda: own, timing=QUICK) as rollouts:
        rollouts.publish(make_snapshot(0))
        step = train_until_up(rollouts, [own])
        rollouts.start_evaluation(pinned=True)
        with pytest.raises(SyncError, match="half of it"):
            train_until_evaluated(rollouts, step)


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        (["async_rl=false"], "async_rl=true"),
        (["eval.blocking=true"], "eval.blocking=false"),
        (["model.lora_type=full"], "adapters alone"),
        (["eval.num_workers=-1"], "at least 0"),
    ],
)
def test_what_they_need(words: list[str], needs: str) -> None:
    with pytest.raises(ConfigError, match=f"eval.num_workers=.*{needs}"):
        load_config("quickstart", ["eval.num_workers=1", *words])
    assert load_config("quickstart", ["eval.num_workers=1"]).eval.num_workers == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "gib", "number"),
    [
        ([], 24, 1),
        ([], 8, 0),
        ([], None, 0),
        (["eval.num_workers=0"], 24, 0),
        (["eval.num_workers=2"], 4, 2),
        (["async_rl=false"], 24, 0),
        (["eval.blocking=true"], 24, 0),
        (["model.lora_type=full"], 24, 0),
        (["rollout.tensor_parallel=2"], 24, 0),
    ],
)
def test_their_number_on_a_machine_without_gpus(
    words: list[str], gib: int | None, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("tora.launch.eval_workers.machine_memory", lambda device: None if gib is None else gib << 30)
    cfg = load_config("quickstart", ["device=cpu", *words])
    assert with_eval_workers(cfg).eval.num_workers == number  # type: ignore[union-attr]


def test_there_is_none_on_gpus_in_a_cluster_and_without_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tora.launch.eval_workers.machine_memory", lambda device: 24 << 30)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cfg = load_config("quickstart", [])
    assert with_eval_workers(cfg, on_gpu=True).eval.num_workers == 0  # type: ignore[union-attr]
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert with_eval_workers(cfg, on_gpu=False).eval.num_workers == 0  # type: ignore[union-attr]
    assert with_eval_workers(load_config("quickstart", ["eval=null"])).eval is None


def test_what_a_cluster_needs_does_not_keep_a_run_from_being_evaluated(tmp_path: Path) -> None:
    """`tora eval` and `tora export` are one process."""
    words = ["eval.num_workers=1", "rollout.min_workers=1", "rollout.stragglers=oversample", "marked_nodes=true"]
    cfg = load_config("quickstart", [*words, "whole_gpus=true", f"output_dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(dump_yaml(cfg))
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="has neither a result nor a checkpoint"):
        find(str(tmp_path))
