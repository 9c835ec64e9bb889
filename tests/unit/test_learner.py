"""The learner: the result of a step, checkpoints and export."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import shake
from decoders import packed_logits
from learners import config, make_batch, make_groups, weights
from tiny import make_text_model
from transformers import AutoModelForCausalLM

import learner.loss
from learner.learner import Learner
from learner.loss import LossInputs
from learner.mismatch import mismatch
from tora.adapters.inject import adapters_off
from tora.types import TrainBatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("episodes", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_the_first_step_equals_a_reference_by_hand(
    folder: Path, temperature: float, episodes: bool, share_prefix: bool
) -> None:
    """Packed and chunked log-probs equal those of transformers, one unpadded sequence at a time. An environment's
    tokens are context: they are in no loss, no mean and no log-ratio."""
    learner = Learner(config(folder))
    groups = make_groups(episodes=episodes)
    result = learner.step(make_batch(groups, temperature=temperature, share_prefix=share_prefix))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, tokens, k3 = 0.0, 0, 0.0
    for group in groups:
        rewards = torch.tensor([r.reward for r in group.rollouts], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / rewards.std()
        for rollout, advantage in zip(group.rollouts, advantages.tolist(), strict=True):
            ids = torch.tensor([*group.prompt.token_ids, *rollout.token_ids.tolist()])
            with torch.no_grad():
                logits = reference(ids[None]).logits[0, len(group.prompt.token_ids) - 1 : -1] / temperature
            logprobs = logits.log_softmax(1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            d = logprobs[torch.tensor(rollout.sampled)] - torch.tensor(rollout.actor_logprobs)
            total -= float((d.exp().clamp_max(2.0) * advantage).sum())
            k3 += float((d.exp() - d - 1).sum())
            tokens += len(d)
    assert result.version == 1
    assert result.metrics["loss/total"] == pytest.approx(total / tokens, rel=1e-4)
    assert result.metrics["mismatch_kl"] == pytest.approx(k3 / tokens, rel=1e-3)


@pytest.mark.parametrize("lora_type", ["full", "lora", "dora", "dora_cache"])
def test_micro_batches_do_not_change_the_update(folder: Path, lora_type: str) -> None:
    groups = make_groups()
    whole, cut = (Learner(config(folder, lora_type)) for _ in range(2))
    big, small = make_batch(groups), make_batch(groups, capacity=40)
    assert len(big.micro_batches) == 1 < len(small.micro_batches)
    for _ in range(3):
        a, b = whole.step(big), cut.step(small)
    for name in a.metrics:
        assert a.metrics[name] == pytest.approx(b.metrics[name], rel=1e-3, abs=1e-5), name
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(cut)[name], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("lora_type", ["full", "lora", "dora", "dora_cache"])
def test_a_step_changes_exactly_the_trained_parameters(folder: Path, lora_type: str) -> None:
    learner = Learner(config(folder, lora_type))
    before, frozen = (
        weights(learner),
        {n: p.clone() for n, p in learner.model.named_parameters() if not p.requires_grad},
    )
    for _ in range(2):  # B starts at zero, so A has no gradient in the first update
        learner.step(make_batch(make_groups()))
    after = weights(learner)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(p, dict(learner.model.named_parameters())[n]) for n, p in frozen.items())


def test_kl_is_to_the_base_without_adapter_and_zero_at_the_start(folder: Path) -> None:
    loss = {"_component_": "learner.loss.GRPOLoss", "kl_coeff": 0.1}
    learner = Learner(config(folder, "dora_cache", loss=loss))
    batch = make_batch(make_groups())
    assert learner.step(batch).metrics["kl/mean"] == pytest.approx(0, abs=1e-6)
    shake(learner.model)
    tokens, total = 0, 0.0
    for group in make_groups():
        for rollout in group.rollouts:
            ids, start = torch.tensor([*group.prompt.token_ids, *rollout.token_ids]), len(group.prompt.token_ids)
            with torch.no_grad():
                on = packed_logits(learner.model, [ids])[start - 1 : -1].log_softmax(1)
                with adapters_off(learner.model):
                    off = packed_logits(learner.model, [ids])[start - 1 : -1].log_softmax(1)
            d = (off - on).gather(1, ids[start:, None])
            total += float((d.exp() - d - 1).sum())
            tokens += len(d)
    assert learner.step(batch).metrics["kl/mean"] == pytest.approx(total / tokens, rel=1e-3)


def spy_on(learner: Learner) -> list[LossInputs]:
    """A list that collects the inputs of every later call of the learner's loss."""
    seen: list[LossInputs] = []
    loss = learner.loss

    class Spy:
        kl_coeff, kl_type, kl_in, proximal = loss.kl_coeff, loss.kl_type, loss.kl_in, loss.proximal

        def __call__(self, inputs: LossInputs) -> Any:
            seen.append(inputs)
            return loss(inputs)

    learner.loss = Spy()
    return seen


@pytest.mark.parametrize("capacity", [10_000, 40])
def test_kl_in_the_reward_changes_the_advantages_and_adds_no_loss(folder: Path, capacity: int) -> None:
    loss = {"_component_": "learner.loss.GRPOLoss", "kl_coeff": 0.1, "kl_in": "reward"}
    learner = Learner(config(folder, "dora", loss=loss))
    shake(learner.model)
    seen = spy_on(learner)
    batch = make_batch(make_groups(), capacity)
    metrics = learner.step(batch).metrics
    assert metrics["loss/total"] == metrics["loss/policy"]
    assert metrics["kl/mean"] != pytest.approx(0, abs=1e-3)
    members: dict[int, list[tuple[float, float]]] = {}
    for x, m in zip(seen, batch.micro_batches, strict=True):
        assert x.ref_logprobs_N is not None
        for b, (group, reward) in enumerate(zip(m.groups_B, m.rewards_B, strict=True)):
            mine = x.sequence_N == b
            kl = (x.actor_logprobs_N[mine].double() - x.ref_logprobs_N[mine].double()).sum().item()
            members.setdefault(int(group), []).append((reward - 0.1 * kl, x.advantages_N[mine][0].item()))
    for pairs in members.values():
        rewards = np.array([reward for reward, _ in pairs])
        expected = (rewards - rewards.mean()) / rewards.std(ddof=1)
        np.testing.assert_allclose([advantage for _, advantage in pairs], expected, rtol=1e-5)


LOSSES = {
    "GRPOLoss": {},
    "DrGRPOLoss": {"normalization": "constant", "normalize_advantages": False},
    "DAPOLoss": {},
    "GSPOLoss": {"normalization": "sequence"},
    "CISPOLoss": {},
    "DPPOLoss": {},
    "SAPOLoss": {"normalization": "sequence"},
}


@pytest.mark.parametrize(
    ("name", "correction"), [(name, kind) for name in LOSSES for kind in getattr(learner.loss, name).corrections]
)
def test_every_loss_trains(folder: Path, name: str, correction: str) -> None:
    """With wide bounds, since the actor's log-probs are random and a narrow mask could remove every token."""
    loss: dict[str, Any] = {"_component_": f"learner.loss.{name}", "importance_correction": correction}
    loss["proximal"] = "learner"  # DPPO's is the actor, without a correction
    if correction.endswith("mask"):
        loss |= {"importance_low": 0.01, "importance_high": 100.0}
    learner = Learner(config(folder, "dora_cache", loss=loss, ppo_epochs=2))
    before, batch = weights(learner), make_batch(make_groups(), 60, **LOSSES[name])
    results = [learner.step(batch) for _ in range(2)]
    for result in results:
        assert all(np.isfinite(value) for value in result.metrics.values())
        assert 0 <= result.metrics["importance/cut_share"] <= 1 and 0 <= result.metrics["loss/clip_share"] <= 1
        assert 3 < result.metrics["policy/entropy"] < 6, "a mean over tokens, whatever the sum of weights"
    assert all(not torch.equal(before[key], tensor) for key, tensor in weights(learner).items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_entropy_bonus_acts_on_groups_without_signal(folder: Path, dtype: str) -> None:
    loss = {"_component_": "learner.loss.GRPOLoss", "entropy_coeff": 1.0}
    cfg = dataclasses.replace(config(folder, loss=loss, optimizer={"_component_": "torch.optim.SGD", "lr": 0.3}))
    trained = Learner(dataclasses.replace(cfg, dtype=dtype))
    groups = [
        dataclasses.replace(g, rollouts=tuple(dataclasses.replace(r, reward=1.0) for r in g.rollouts))
        for g in make_groups()
    ]
    assert not make_batch(groups).micro_batches
    shake(trained.model)
    steps = [trained.step(make_batch(groups, regularizer="loss")).metrics for _ in range(4)]
    entropies = [step["policy/entropy"] for step in steps]
    assert entropies == sorted(entropies) and entropies[-1] > entropies[0] + 0.01
    assert [step["loss/total"] for step in steps] == pytest.approx([-entropy for entropy in entropies], rel=1e-5)


def test_full_weights_keep_a_frozen_reference(folder: Path) -> None:
    loss = {"_component_": "learner.loss.GRPOLoss", "kl_coeff": 0.1}
    learner = Learner(config(folder, "full", loss=loss))
    batch = make_batch(make_groups())
    kl = [learner.step(batch).metrics["kl/mean"] for _ in range(4)]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[-1] > 1e-4


def test_several_epochs_clip_around_the_policy_before_the_step(folder: Path) -> None:
    learner = Learner(config(folder, ppo_epochs=3))
    seen = spy_on(learner)
    shake(learner.model)
    start = copy.deepcopy(learner.model)
    result = learner.step(make_batch(make_groups()))
    assert result.version == 1 and len(seen) == 3
    assert all(torch.equal(x.proximal_logprobs_N, seen[0].proximal_logprobs_N) for x in seen)
    torch.testing.assert_close(seen[0].learner_logprobs_N, seen[0].proximal_logprobs_N)
    assert not torch.allclose(seen[2].learner_logprobs_N, seen[2].proximal_logprobs_N, atol=1e-4)
    changed = [not torch.equal(p, q) for p, q in zip(start.parameters(), learner.model.parameters(), strict=True)]
    assert any(changed)


def test_an_empty_batch_advances_only_the_version(folder: Path) -> None:
    learner = Learner(config(folder))
    learner.step(make_batch(make_groups()))
    before = weights(learner)
    idle = learner.step(TrainBatch((), 1.0))
    assert idle.version == 2 and 0.05 < idle.memory_gib < 100 and idle.metrics["learner/updates"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(learner).items())


def test_mismatch_kl_uses_the_newest_tokens(folder: Path) -> None:
    learner = Learner(config(folder))
    young, old = make_groups(2, seed=1, version=1), make_groups(2, seed=2, version=0)
    mixed = learner.step(make_batch(young + old)).metrics
    alone = Learner(config(folder)).step(make_batch(young)).metrics
    assert mixed["mismatch_kl"] == pytest.approx(alone["mismatch_kl"], rel=1e-4)
    assert mixed["policy_kl"] != pytest.approx(alone["policy_kl"], rel=1e-2)


def test_effective_sample_size_and_quantiles() -> None:
    zeros = np.zeros(4, np.int64)
    same = mismatch(np.zeros(4, np.float32), zeros)
    assert same["importance/ess"] == same["importance/ratio_p50"] == same["mismatch_max_ratio"] == 1
    one = mismatch(np.log([1, 1, 1, 5]), zeros)  # (1 + 1 + 1 + 5)² / (4 · 28)
    assert one["importance/ess"] == pytest.approx(64 / 112)
    many = mismatch(np.log(np.linspace(1, 2, 101)), np.zeros(101, np.int64))
    assert [many[f"importance/ratio_{q}"] for q in ("p01", "p50", "p99")] == pytest.approx([1.01, 1.5, 1.99])


def test_the_proximal_policy_is_the_learners_or_the_actors(folder: Path) -> None:
    """Clipping around the actor's policy affects the first update on off-policy tokens; clipping around the learner's
    does not. Without clipping the two objectives have the same gradient, since the importance correction ρ then equals
    the ratio to the actor's policy."""
    loss = {"_component_": "learner.loss.GRPOLoss", "importance_correction": "none"}
    batch, results = make_batch(make_groups()), {}
    for proximal, wide in [("learner", False), ("actor", False), ("actor", True), ("corrected", True)]:
        own = {**loss, "proximal": "learner" if proximal == "corrected" else proximal}
        if proximal == "corrected":
            own |= {"importance_correction": "token_tis", "importance_high": 1e9}
        if wide:
            own |= {"clip_low": 1.0, "clip_high": 1e9}
        results[proximal, wide] = Learner(config(folder, loss=own)).step(batch).metrics
    assert results["learner", False]["loss/clip_share"] == 0 < results["actor", False]["loss/clip_share"]
    for name in ("learner/grad_norm", "loss/total"):
        assert results["actor", True][name] == pytest.approx(results["corrected", True][name], rel=1e-4)


@pytest.mark.parametrize("lora_type", ["full", "lora", "dora", "dora_cache"])
def test_a_restored_learner_continues_bit_for_bit(folder: Path, tmp_path: Path, lora_type: str) -> None:
    batches = [make_batch(make_groups(seed=i)) for i in range(4)]
    unbroken = Learner(config(folder, lora_type))
    results = [unbroken.step(b) for b in batches[:2]]
    unbroken.save(tmp_path)
    results += [unbroken.step(b) for b in batches[2:]]
    restored = Learner(dataclasses.replace(config(folder, lora_type), seed=99))  # `restore` overwrites it
    restored.restore(tmp_path)
    assert [restored.step(b) for b in batches[2:]] == results[2:]
    assert all(torch.equal(tensor, weights(restored)[name]) for name, tensor in weights(unbroken).items())
    assert not [f for f in tmp_path.iterdir() if f.suffix not in (".json", ".safetensors")], "nothing pickled"


def test_a_checkpoint_of_other_parameters_is_refused(folder: Path, tmp_path: Path) -> None:
    Learner(config(folder, "lora")).save(tmp_path)
    with pytest.raises(ValueError, match="different parameters"):
        Learner(config(folder, "dora")).restore(tmp_path)


def test_full_weights_export_as_a_hugging_face_folder(folder: Path, tmp_path: Path) -> None:
    learner = Learner(config(folder, "full"))
    learner.step(make_batch(make_groups()))
    learner.export(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(10, 40)
    with torch.no_grad():
        torch.testing.assert_close(
            packed_logits(learner.model, [ids]), theirs(ids[None]).logits[0], atol=1e-4, rtol=1e-5
        )
