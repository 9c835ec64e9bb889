"""Mini-batches: how a step's groups are dealt to them, and the learner's updates against an independent loop."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparisons import compare
from learners import config, make_batch, make_groups, weights
from tiny import make_text_model
from transformers import AutoModelForCausalLM

from learner.fsdp import share_micro_batches
from learner.learner import Learner
from tora.batching.batch import mini_batches
from tora.types import MicroBatch, TrainBatch

SGD = {"_component_": "torch.optim.SGD", "lr": 3.0}
"""Far enough in one update that ratios leave the clip range, and free of Adam's division by |gradient|."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("groups", "count"), [(6, 2), (7, 3), (2, 4), (1, 2), (0, 3), (5, 5)])
def test_groups_are_dealt_evenly_and_reproducibly(groups: int, count: int) -> None:
    dealt = mini_batches(range(groups), count, (3, 1))
    assert sorted(g for part in dealt for g in part) == list(range(groups))
    assert len(dealt) == min(count, groups)
    assert not dealt or max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert dealt == mini_batches(range(groups), count, (3, 1)), "a resumed run deals them alike"


def test_every_step_deals_anew_and_one_mini_batch_keeps_the_order() -> None:
    dealt = [mini_batches(range(12), 2, (0, version)) for version in range(5)]
    assert all(a != b for a, b in pairwise(dealt))
    assert mini_batches(range(12), 1, (0, 7)) == [list(range(12))]


def same(a: MicroBatch, b: MicroBatch) -> bool:
    pairs = ((getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(MicroBatch))
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_ranks_share_each_mini_batch(size: int, count: int) -> None:
    micro = make_batch(make_groups(5), 40, num_mini_batches=count).micro_batches
    assert count == 1 or len({len([m for m in micro if m.mini_batch == n]) for n in range(count)}) > 1
    shares = [share_micro_batches(micro, rank, size) for rank in range(size)]
    assert len({tuple(m.mini_batch for m in share) for share in shares}) == 1, "in step, mini-batch by mini-batch"
    counting = [m for share in shares for m in share if m.weights_N.any()]
    assert len(counting) == len(micro) and all(any(same(m, c) for c in counting) for m in micro)


def test_the_learner_updates_as_a_float64_loop_does(folder: Path) -> None:
    """Full weights and plain SGD. The reference: transformers in float64, one unpadded sequence at a time, with the old
    log-probs of the policy before the step, and one update for each mini-batch in each epoch."""
    groups = make_groups(4)
    cfg = config(folder, "full", optimizer=SGD, clip_grad_norm=None, num_mini_batches=2, ppo_epochs=2)
    learner = Learner(cfg)
    batch = make_batch(groups, num_mini_batches=2, seed=(0, 0))
    metrics = learner.step(batch).metrics

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD["lr"])

    def logprobs(prompt: tuple[int, ...], completion: np.ndarray) -> torch.Tensor:
        ids = torch.tensor([*prompt, *completion.tolist()])
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(1).gather(1, torch.tensor(completion)[:, None])[:, 0]

    with torch.no_grad():
        old = [[logprobs(g.prompt.token_ids, r.token_ids) for r in g.rollouts] for g in groups]
    for _ in range(2):
        losses, clipped = [], []
        for part in mini_batches(range(4), 2, (0, 0)):
            total, tokens, held = torch.zeros((), dtype=torch.float64), 0, 0
            for number in part:
                rewards = torch.tensor([r.reward for r in groups[number].rollouts], dtype=torch.float64)
                advantages = ((rewards - rewards.mean()) / rewards.std()).tolist()
                for rollout, old_L, a in zip(groups[number].rollouts, old[number], advantages, strict=True):
                    new_L = logprobs(groups[number].prompt.token_ids, rollout.token_ids)
                    correction_L = (old_L - torch.tensor(rollout.actor_logprobs)).exp().clamp_max(2)
                    ratio_L = (new_L - old_L).exp()
                    surrogate_L = torch.minimum(ratio_L * a, ratio_L.clamp(0.8, 1.2) * a)
                    total = total - (correction_L * surrogate_L).sum()
                    held += int((ratio_L.clamp(0.8, 1.2) * a < ratio_L * a).sum())
                    tokens += len(new_L)
            optimizer.zero_grad()
            (total / tokens).backward()
            optimizer.step()
            losses.append(total.item() / tokens)
            clipped.append(held / tokens)
    assert metrics["learner/updates"] == 4 and all(share > 0 for share in clipped)
    assert metrics["loss/clip_share"] == pytest.approx(np.mean(clipped), abs=1e-6)
    assert metrics["loss/total"] == pytest.approx(np.mean(losses), rel=1e-4)
    theirs = {name: p.detach().float() for name, p in model.named_parameters()}
    ours = {learner.model.names.parameter_to_hf(name): p for name, p in weights(learner).items()}
    compare(ours, {name: theirs[name] for name in ours})


def clip_share(folder: Path, count: int, dtype: Any = "fp32") -> float:
    cfg = dataclasses.replace(config(folder, optimizer={**SGD, "lr": 30.0}, clip_grad_norm=None), dtype=dtype)
    learner = Learner(cfg)
    batch = make_batch(make_groups(4), num_mini_batches=count)
    return [learner.step(batch).metrics["loss/clip_share"] for _ in range(2)][-1]


def test_the_clip_acts_from_the_second_update_on(folder: Path) -> None:
    assert clip_share(folder, 1) == 0
    share = clip_share(folder, 2)
    assert 0.01 < share < 1
    assert share / 2 < clip_share(folder, 2, "bf16") < share * 2, "bf16's noise moves tokens across the bounds"


def test_a_restored_learner_continues_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    batches = [make_batch(make_groups(4, seed=i), num_mini_batches=3, seed=(0, i)) for i in range(3)]
    unbroken = Learner(config(folder, "dora_cache"))
    unbroken.step(batches[0])
    unbroken.save(tmp_path)
    results = [unbroken.step(b) for b in batches[1:]]
    restored = Learner(config(folder, "dora_cache"))
    restored.restore(tmp_path)
    assert [restored.step(b) for b in batches[1:]] == results


def test_a_reward_penalty_covers_all_mini_batches(folder: Path) -> None:
    """Penalized advantages are those of whole groups, so one pass over two halves equals the halves one by one."""
    loss = {"_component_": "learner.loss.GRPOLoss", "kl_coeff": 0.1, "kl_in": "reward"}
    frozen = {**SGD, "lr": 1e-30}
    batch = make_batch(make_groups(4), 40, num_mini_batches=2, regularizer="reward")
    found = Learner(config(folder, loss=loss, optimizer=frozen)).step(batch).metrics
    halves = []
    for number in range(2):
        half = TrainBatch(tuple(m for m in batch.micro_batches if m.mini_batch == number), 1.0)
        halves.append(Learner(config(folder, loss=loss, optimizer=frozen)).step(half).metrics)
    for name in ("loss/total", "kl/mean", "learner/grad_norm", "policy/entropy"):
        assert found[name] == pytest.approx(np.mean([half[name] for half in halves]), rel=1e-6)


def test_a_bad_value_in_the_second_mini_batch_leaves_the_first_update_made(folder: Path) -> None:
    batch = make_batch(make_groups(4), num_mini_batches=2)
    first, second = batch.micro_batches
    cut = TrainBatch((first, dataclasses.replace(second, advantages_N=second.advantages_N * np.nan)), 1.0)
    learner, half = (Learner(config(folder)) for _ in range(2))
    result = learner.step(cut)
    half.step(TrainBatch((first,), 1.0))
    assert "in update 2 of 2" in result.bad and result.version == 1
    assert (result.metrics["learner/updates"], result.metrics["learner/bad_step"]) == (1, 1)
    compare(weights(learner), weights(half), atol=0)
