"""Bounded staleness: properties over random histories."""

import random

import pytest
from fakes import make_group, make_prompt

from actors.buffer import Buffer, Slot
from tora.types import Group


def least_of(per_step: int, in_parts: bool, seed: int) -> int | None:
    return random.Random(seed).randint(1, per_step) if in_parts else None


def take(buffer: Buffer, step: int) -> list[Group]:
    """All that the step has then. What it had before counts as finished until it has the rest."""
    begun, number = buffer.num_begun, buffer.can_take(step)
    finished = [group for _, group in buffer.finished()]
    groups = buffer.take(step)
    assert len(groups) == begun + number and set(map(id, groups)) <= set(map(id, finished))
    left = [group for _, group in buffer.finished()]
    assert set(map(id, left)) == set(map(id, finished)) - (set() if buffer.num_begun else set(map(id, groups)))
    return groups


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("seed", range(60))
def test_staleness_never_exceeds_the_bound_and_nothing_stalls(bound: int, seed: int, in_parts: bool) -> None:
    rng = random.Random(seed)
    per_step = rng.randint(1, 6)
    buffer, running = Buffer(per_step, bound, least=least_of(per_step, in_parts, seed)), list[Slot]()
    prompt_id, step = 0, 0
    while step < 40:
        moves = ["start"] * buffer.may_grant() + ["finish"] * bool(running) + ["train"] * bool(buffer.can_take(step))
        assert moves, "deadlock: nothing can happen"
        match rng.choice(moves):
            case "start":
                running.append(buffer.grant(make_prompt(prompt_id)))
                prompt_id += 1
            case "finish":
                slot = running.pop(rng.randrange(len(running)))
                if rng.random() < 0.3:
                    buffer.release(slot)
                else:
                    buffer.put(slot, make_group(slot.prompt, [0, 1], slot.version))
            case "train":
                groups = take(buffer, step)
                assert all(0 <= step - group.version <= bound for group in groups)
                if len(groups) == per_step:
                    step += 1
                    buffer.advance(step)


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("seed", range(60))
def test_workers_that_install_in_their_own_time_keep_the_bound(bound: int, seed: int, in_parts: bool) -> None:
    """A group has the version that its worker had when it began; a step begins before all workers have the newest."""
    rng = random.Random(seed)
    per_step = rng.randint(1, 6)
    buffer = Buffer(per_step, bound, least=least_of(per_step, in_parts, seed))
    running, workers = list[Slot](), [0] * rng.randint(1, 5)
    prompt_id, step, oldest = 0, 0, 0
    while step < 40:
        free = [version for version in workers if buffer.may_grant(version)]
        lagging = [number for number, version in enumerate(workers) if version < step]
        moves = ["start"] * bool(free) + ["finish"] * bool(running) + ["train"] * bool(buffer.can_take(step))
        moves += ["install"] * bool(lagging)
        assert moves, "deadlock: nothing can happen"
        match rng.choice(moves):
            case "install":
                workers[rng.choice(lagging)] = step
            case "start":
                version = rng.choice(free)
                running.append(buffer.grant(make_prompt(prompt_id), version))
                assert running[-1].version == version
                prompt_id += 1
            case "finish":
                slot = running.pop(rng.randrange(len(running)))
                if rng.random() < 0.3:
                    buffer.release(slot)
                else:
                    buffer.put(slot, make_group(slot.prompt, [0, 1], slot.version))
            case "train":
                groups = take(buffer, step)
                assert all(0 <= step - group.version <= bound for group in groups)
                oldest = max(oldest, max(step - group.version for group in groups))
                if len(groups) == per_step:
                    step += 1
                    buffer.advance(step)
    assert oldest == bound or in_parts


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize("seed", range(60))
def test_with_spare_slots_no_group_is_trained_late_lost_or_waited_for(bound: int, seed: int, in_parts: bool) -> None:
    """Some groups never finish; no other group is dropped before a step could have trained it."""
    rng = random.Random(seed)
    per_step = rng.randint(1, 6)
    spare = rng.randint(1, 4)
    buffer, running = Buffer(per_step, bound, spare=spare, least=least_of(per_step, in_parts, seed)), list[Slot]()
    prompt_id, step, trained, dropped = 0, 0, list[int](), list[int]()
    stuck: set[Slot] = set()
    while step < 40:
        able = [slot for slot in running if slot not in stuck]
        moves = ["start"] * buffer.may_grant() + ["finish"] * bool(able)
        moves += ["train"] * bool(buffer.can_take(step)) if buffer.version == step else ["publish"]
        assert moves, "deadlock: nothing can happen"
        match rng.choice(moves):
            case "publish":
                buffer.advance(step)
            case "start":
                running.append(buffer.grant(make_prompt(prompt_id)))
                if len(stuck & set(running)) < spare and rng.random() < 0.5:
                    stuck.add(running[-1])
                prompt_id += 1
            case "finish":
                slot = rng.choice(able)
                running.remove(slot)
                buffer.put(slot, make_group(slot.prompt, [0, 1], slot.version))
            case "train":
                groups = take(buffer, step)
                assert all(0 <= step - group.version <= bound for group in groups)
                if len(groups) < per_step:
                    continue
                late, finished = buffer.expire(step)
                assert all(slot.version + bound == step for slot in (*late, *finished)), "as early as that, not later"
                running = [slot for slot in running if slot not in late]
                trained += [group.prompt.id for group in groups]
                dropped += [slot.prompt.id for slot in (*late, *finished)]
                step += 1
    ready = [group.prompt.id for _, group in buffer.finished()]
    assert sorted([*trained, *dropped, *ready, *buffer.in_flight()]) == list(range(prompt_id)), "each once"


def test_without_spare_slots_nothing_expires() -> None:
    buffer = Buffer(1, 0)
    slot = buffer.grant(make_prompt(0))
    buffer.put(slot, make_group(slot.prompt, [0, 1]))
    buffer.take(0)
    assert buffer.expire(0) == ([], [])


def test_bound_zero_is_the_synchronous_schedule() -> None:
    buffer = Buffer(2, 0)
    slots = [buffer.grant(make_prompt(i)) for i in range(2)]
    assert not buffer.may_grant(), "nothing runs ahead of the learner"
    for slot in slots:
        buffer.put(slot, make_group(slot.prompt, [0, 1]))
    buffer.take(0)
    assert not buffer.may_grant(), "nothing starts under an outdated version"
    buffer.advance(1)
    assert buffer.may_grant()


def test_it_separates_prompts_in_flight_from_finished_groups() -> None:
    buffer = Buffer(2, 1)
    slots = [buffer.grant(make_prompt(i)) for i in range(4)]
    buffer.put(slots[2], make_group(slots[2].prompt, [0, 1]))
    buffer.release(slots[1])
    assert buffer.in_flight() == [0, 3]
    assert [(born, group.prompt.id) for born, group in buffer.finished()] == [(0, 2)]
