"""The reference of the KL term: the policy as training began, or the base, whatever of it is trained."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import TYPES, shake
from learners import config, make_batch, make_groups, weights
from references import KL, SEEN, peft_logprobs, seen_reference, write_adapter
from tiny import make_text_model, make_vl_model
from vision_learners import batch_of, vision_groups, vl_config

from learner.learner import Learner
from tora.config.schema import RunConfig
from tora.distributed.process_group import leave
from tora.errors import ConfigError

BASE = {**KL, "reference": "base"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each adapter type, a PEFT folder whose B is not zero."""
    out = tmp_path_factory.mktemp("adapters")
    return {kind: write_adapter(config(folder, kind), out / kind) for kind in TYPES}


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """A learner in bf16 that trains whole weights joins a process group of its own."""
    yield
    leave()


def starting_from(adapter: Path, cfg: RunConfig, **changes: Any) -> RunConfig:
    model = dataclasses.replace(cfg.model, adapter_path=str(adapter))
    return dataclasses.replace(cfg, model=model, **{"loss": KL, **changes})


def check_bf16(found: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> None:
    """Raises AssertionError unless `found` is about as far from `exact` as another library's bf16 is."""
    error, bf16_alone = (found - exact).abs().mean(), (rounded - exact).abs().mean()
    assert 0 < error < 2 * bf16_alone, f"{error} against {bf16_alone}"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", TYPES)
def test_kl_pulls_to_the_adapter_that_the_run_starts_from(
    folder: Path, adapters: dict[str, Path], kind: str, dtype: str
) -> None:
    learner = Learner(starting_from(adapters[kind], config(folder, kind), dtype=dtype))
    groups = make_groups()
    batch = make_batch(groups)
    assert learner.step(batch).metrics["kl/mean"] == pytest.approx(0, abs=1e-10)
    first = seen_reference(batch, groups)
    for _ in range(3):
        result = learner.step(batch)
    assert result.metrics["kl/mean"] > 1e-4, "the policy has moved"
    assert torch.equal(seen_reference(batch, groups), first), "and the reference has not"
    exact = peft_logprobs(folder, adapters[kind], groups, "fp32")
    if dtype == "fp32":
        torch.testing.assert_close(first, exact, atol=2e-4, rtol=1e-5)
    else:
        check_bf16(first, exact, peft_logprobs(folder, adapters[kind], groups, "bf16"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["lora", "dora_cache"])
def test_kl_pulls_to_the_base_on_request(folder: Path, adapters: dict[str, Path], kind: str, dtype: str) -> None:
    learner = Learner(starting_from(adapters[kind], config(folder, kind), loss=BASE, dtype=dtype))
    groups = make_groups()
    batch = make_batch(groups)
    assert learner.step(batch).metrics["kl/mean"] > 1
    found = seen_reference(batch, groups)
    exact = peft_logprobs(folder, None, groups, "fp32")
    if dtype == "fp32":
        torch.testing.assert_close(found, exact, atol=2e-4, rtol=1e-5)
    else:
        check_bf16(found, exact, peft_logprobs(folder, None, groups, "bf16"))


@pytest.mark.parametrize("changes", [{"quantize_base": True}, {"share_prefix": True}, {"capacity": 40}])
def test_kl_is_zero_at_the_start_over_nf4_and_in_every_packing(
    folder: Path, adapters: dict[str, Path], changes: dict[str, Any]
) -> None:
    cfg = config(folder, "dora_cache", quantize_base="quantize_base" in changes)
    learner = Learner(starting_from(adapters["dora_cache"], cfg))
    batch = make_batch(make_groups(), **{name: value for name, value in changes.items() if name != "quantize_base"})
    assert learner.step(batch).metrics["kl/mean"] == pytest.approx(0, abs=1e-10)
    assert learner.step(batch).metrics["kl/mean"] > 1e-6


def test_kl_in_the_reward_is_taken_from_the_same_reference(folder: Path, adapters: dict[str, Path]) -> None:
    """The actor's log-probs are the starting policy's, so nothing is subtracted from the rewards at the first step."""
    groups = make_groups()
    lengths = [len(rollout.token_ids) for group in groups for rollout in group.rollouts]
    logprobs = iter(peft_logprobs(folder, adapters["lora"], groups, "fp32").split(lengths))
    groups = [
        dataclasses.replace(
            g, rollouts=tuple(dataclasses.replace(r, actor_logprobs=next(logprobs).numpy()) for r in g.rollouts)
        )
        for g in groups
    ]
    advantages = []
    for loss in (KL, {**KL, "kl_in": "reward", "kl_coeff": 1.0}):
        Learner(starting_from(adapters["lora"], config(folder, "lora"), loss=loss)).step(make_batch(groups))
        advantages.append(SEEN[-1].advantages_N)
    torch.testing.assert_close(*advantages, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["lora", "dora_cache"])
def test_the_reference_survives_a_resume(folder: Path, adapters: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Even if the folder that the run started from holds another adapter by then."""
    start = shutil.copytree(adapters[kind], tmp_path / "start")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    unbroken, batches = (
        Learner(starting_from(start, config(folder, kind))),
        [make_batch(make_groups(seed=i)) for i in range(3)],
    )
    for batch in batches[:2]:
        unbroken.step(batch)
    unbroken.save(checkpoint)
    expected = unbroken.step(batches[2])
    shutil.rmtree(start)
    write_adapter(dataclasses.replace(config(folder, kind), seed=5), start)
    resumed = Learner(starting_from(start, config(folder, kind)))
    resumed.restore(checkpoint)
    assert resumed.step(batches[2]) == expected
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(unbroken).items())


def test_a_checkpoint_without_kl_resumes_with_it(folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """The reference is then the folder's adapter."""
    Learner(starting_from(adapters["lora"], config(folder, "lora"), loss={**KL, "kl_coeff": 0.0})).save(tmp_path)
    resumed = Learner(starting_from(adapters["lora"], config(folder, "lora")))
    resumed.restore(tmp_path)
    assert resumed.step(make_batch(make_groups())).metrics["kl/mean"] == pytest.approx(0, abs=1e-10)


def test_computing_the_reference_changes_no_bit_of_the_policy(folder: Path, adapters: dict[str, Path]) -> None:
    still = {"_component_": "torch.optim.SGD", "lr": 1e-45}  # a step of it is lost in rounding
    learner = Learner(starting_from(adapters["dora_cache"], config(folder, "dora_cache"), optimizer=still))
    shake(learner.model)
    state = {n: t.clone() for n, t in (*learner.model.named_parameters(), *learner.model.named_buffers())}
    learner.step(make_batch(make_groups()))
    after = dict((*learner.model.named_parameters(), *learner.model.named_buffers()))
    assert all(torch.equal(state[name], tensor) for name, tensor in after.items())


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vl_model(tmp_path_factory.mktemp("vl"))


@pytest.mark.parametrize(
    ("start", "dtype"), [("new", "fp32"), ("initial", "fp32"), ("base", "fp32"), ("initial", "bf16")]
)
def test_a_tower_that_is_trained_whole_has_a_frozen_reference(vl: Path, tmp_path: Path, start: str, dtype: str) -> None:
    cfg = vl_config(vl, "dora_cache", "full", loss=KL, dtype=dtype)
    adapter = None
    if start != "new":
        adapter = write_adapter(vl_config(vl, "dora_cache", "full"), tmp_path / "adapter")
        cfg = starting_from(adapter, cfg, loss={**KL, "reference": start})
    learner, groups = Learner(cfg), vision_groups(vl)
    batch = batch_of(groups)
    kl = [learner.step(batch).metrics["kl/mean"] for _ in range(4)]
    found = seen_reference(batch, groups)
    assert (kl[0] > 1) if start == "base" else kl[0] == pytest.approx(0, abs=1e-10 if dtype == "fp32" else 1e-3)
    reference = adapter if start == "initial" else None
    exact = peft_logprobs(vl, reference, groups, "fp32")
    if dtype == "fp32":
        torch.testing.assert_close(found, exact, atol=5e-4, rtol=1e-5)
    else:
        check_bf16(found, exact, peft_logprobs(vl, reference, groups, "bf16"))


def test_an_unknown_reference_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss.reference=start must be one of initial, base"):
        Learner(config(folder, loss={**KL, "_component_": "learner.loss.GRPOLoss", "reference": "start"}))
