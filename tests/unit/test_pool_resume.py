"""The pool in a run that was interrupted or that goes back to a checkpoint."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeWorker, make_group, make_prompt, make_rollout, make_snapshot
from pools import (
    check_each_prompt_once,
    config,
    next_batch,
    running,
    some_without_signal,
)
from safetensors.numpy import load_file, save_file

from actors.buffer import split_by_deadline
from tora.errors import ConfigError
from tora.run.group_files import load_groups, save_groups
from tora.types import Group, Prompt, RolloutState, StopReason


def test_it_resumes_with_pending_prompts_first() -> None:
    worker = FakeWorker()
    resumed = RolloutState(50, [7, 9])
    with running(config(0, workers=1), lambda: worker, state=resumed, version=12) as rollouts:
        rollouts.publish(make_snapshot(12))
        next_batch(rollouts, 12)
        assert worker.prompt_ids[:4] == [7, 9, 50, 51]


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_an_interrupted_run_and_its_successor_train_each_prompt_once(bound: int, seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)

    def make() -> FakeWorker:
        return FakeWorker(lambda: rng.expovariate(500), some_without_signal)

    trained: list[int] = []
    state, step = RolloutState(), 0
    for _ in range(3):  # each run resumes where the previous one was interrupted
        with running(config(bound), make, state=state, version=step) as rollouts:
            rollouts.publish(make_snapshot(step))
            for _ in range(rng.randint(1, 6)):
                batch = next_batch(rollouts, step)
                assert 0 <= batch.metrics["staleness/max"] <= bound
                assert batch.metrics["reward/mean"] >= 0
                trained += batch.prompt_ids
                step += 1
                rollouts.publish(make_snapshot(step))
            state = rollouts.state()
        folder = tmp_path / str(step)
        folder.mkdir()
        save_groups(folder, state.finished)
        before = state.finished
        state = RolloutState(state.cursor, state.pending, load_groups(folder, make_prompt))
        check_same(before, state.finished)
    assert len(trained) == step * 4
    check_each_prompt_once(trained, state)


def check_same(a: Sequence[tuple[int, Group]], b: Sequence[tuple[int, Group]]) -> None:
    assert [(born, group.prompt, group.seconds) for born, group in a] == [(n, g.prompt, g.seconds) for n, g in b]
    for (_, one), (_, other) in zip(a, b, strict=True):
        for x, y in zip(one.rollouts, other.rollouts, strict=True):
            assert all(np.array_equal(getattr(x, f.name), getattr(y, f.name)) for f in fields(x))


def test_groups_written_before_rollouts_had_a_mask_and_a_stop_reason(tmp_path: Path) -> None:
    saved = [(0, make_group(make_prompt(3), [0, 1]))]
    save_groups(tmp_path, saved)
    arrays = load_file(tmp_path / "groups.safetensors")
    save_file({k: v for k, v in arrays.items() if not k.endswith("sampled")}, tmp_path / "groups.safetensors")
    (row,) = json.loads((tmp_path / "groups.json").read_text())
    for rollout in row["rollouts"]:
        assert rollout.pop("stop_reason") == "stop"
        rollout["stopped"] = True
    (tmp_path / "groups.json").write_text(json.dumps([row]))
    check_same(saved, load_groups(tmp_path, make_prompt))


def test_a_saved_episode_keeps_its_mask_and_stop_reason(tmp_path: Path) -> None:
    rollouts = [make_rollout(range(5), r, sampled=[False, True, True, False, True]) for r in (0.0, 1.0)]
    cut = tuple(replace(rollout, stop_reason=StopReason.TOOL_LIMIT) for rollout in rollouts)
    save_groups(tmp_path, [(0, Group(make_prompt(3), cut))])
    ((_, group),) = load_groups(tmp_path, make_prompt)
    assert all(r.stop_reason is StopReason.TOOL_LIMIT and r.num_sampled == 3 for r in group.rollouts)
    check_same([(0, Group(make_prompt(3), cut))], [(0, group)])


def test_groups_of_another_dataset_are_refused(tmp_path: Path) -> None:
    save_groups(tmp_path, [(0, make_group(make_prompt(3), [0, 1]))])
    with pytest.raises(ConfigError, match="another dataset"):
        load_groups(tmp_path, lambda i: make_prompt(i, length=4))


def test_under_a_smaller_bound_late_groups_are_generated_again() -> None:
    finished = [(born, make_group(make_prompt(i), [0, 1], born)) for i, born in enumerate([4, 4, 5, 6, 6])]
    good, late = split_by_deadline(finished, 2, 2, 6)
    assert (len(good), late) == (5, [])
    good, late = split_by_deadline(finished, 2, 1, 6)
    assert [g.prompt.id for _, g in good] == [2, 3, 4] and [g.prompt.id for _, g in late] == [0, 1]

    def slow_at_1(prompt_id: int) -> Prompt:
        time.sleep(0.05 * (prompt_id == 1))  # 0 is done before 1 is made; 5 waits for its turn all the same
        return make_prompt(prompt_id)

    worker = FakeWorker()
    state = RolloutState(5, [], finished)
    cfg = config(1, workers=1, batch_size=2)
    with running(cfg, lambda: worker, prompt_at=slow_at_1, state=state, version=6) as rollouts:
        rollouts.publish(make_snapshot(6))
        assert next_batch(rollouts, 6).prompt_ids == (2, 3)
        for step in (7, 8):
            rollouts.publish(make_snapshot(step))
            next_batch(rollouts, step)
        assert worker.prompt_ids[:3] == [0, 1, 5]


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_after_a_rewind_each_prompt_is_trained_once_in_the_surviving_history(bound: int, seed: int) -> None:
    rng = random.Random(seed)
    workers = [FakeWorker(lambda: rng.expovariate(500), some_without_signal) for _ in range(2)]
    with running(config(bound), iter(workers).__next__) as rollouts:
        history: dict[int, tuple[int, ...]] = {}
        saved, step = (0, RolloutState()), 0
        rollouts.publish(make_snapshot(0))
        while step < 25:
            batch = next_batch(rollouts, step)
            assert 0 <= batch.metrics["staleness/max"] <= bound, "no group from a version that was rewound"
            history[step] = batch.prompt_ids
            step += 1
            if rng.random() < 0.2:  # the learner is lost during or after its step
                step, state = saved
                rollouts.rewind(state, step)
            rollouts.publish(make_snapshot(step))
            if rng.random() < 0.3:
                saved = (step, rollouts.state())
        state = rollouts.state()
        trained = [i for ids in history.values() for i in ids]
        assert len(trained) == 25 * 4
        check_each_prompt_once(trained, state)
