"""Bad values end to end: on two ranks, and in a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
from learners import SETTINGS, config, make_groups
from planted import with_bad_logprob
from ranks import RANKS, RankProcesses
from runs import SHORT, read, steps
from safetensors.torch import load_file
from tiny import make_text_model

from learner.learner import Learner
from tora.batching.batch import micro_batches
from tora.cli import main
from tora.distributed.process_group import gather_objects
from tora.types import StepResult, TrainBatch

LOSS = {"_component_": "planted.PlantedLoss", "kl_coeff": 0.05}
NEVER = {**LOSS, "first": 1_000_000}


def batch(seed: int, capacity: int = 60) -> TrainBatch:
    made = micro_batches(make_groups(3, seed=seed), capacity=capacity, num_ranks=RANKS, **SETTINGS)
    return TrainBatch(made, 1.0, prompt_ids=(70, 71, 72))


def agreed(result: StepResult) -> StepResult:
    assert set(gather_objects(repr(result))) == {repr(result)}  # nan is not equal to itself
    return result


SECOND = {"first": len(batch(0).micro_batches) // RANKS, "last": len(batch(0).micro_batches) // RANKS}
"""The first micro-batch of a rank's second step."""
CASES = [
    ("full", {"dtype": "bf16"}, {**LOSS, **SECOND, "rank": 1}),
    ("lora", {"fsdp_reshard_after_forward": False}, {**LOSS, **SECOND, "rank": 0, "plant": "gradient"}),
    ("dora_cache", {"quantize_base": True, "ppo_epochs": 2}, NEVER),
]
"""Planted on one rank, or, with a loss that plants nothing, in the actor's log-probs of one sequence."""


def train_through_bad_values(folder: Path) -> None:
    for lora_type, changes, loss in CASES:
        learner = Learner(config(folder, lora_type, learner_ranks=RANKS, loss=loss, **changes))
        other = Learner(config(folder, lora_type, learner_ranks=RANKS, loss=NEVER, **changes))
        assert agreed(learner.step(batch(0))).bad == "" == agreed(other.step(batch(0))).bad
        sent = learner.snapshot().sha256
        bad = agreed(learner.step(with_bad_logprob(batch(1)) if loss is NEVER else batch(1)))
        assert bad.metrics["learner/bad_step"] == 1
        assert ("actor's log-probs of prompt 7" in bad.bad) == (loss is NEVER)
        assert learner.snapshot().sha256 == sent
        other.step(TrainBatch((), 1.0))
        assert agreed(learner.step(batch(2))) == agreed(other.step(batch(2)))
        assert learner.snapshot().sha256 == other.snapshot().sha256
    idle_on_one_rank(folder)


def idle_on_one_rank(folder: Path) -> None:
    """One micro-batch for two ranks: the copy on the idle rank, of weight zero, adds nothing, not even nan."""
    one = micro_batches(make_groups(1), capacity=10_000, **SETTINGS)
    assert len(one) == 1
    one[0].actor_logprobs_N[0] = -500.0  # exp of this ratio would overflow
    loss = {"_component_": "learner.loss.GRPOLoss", "importance_correction": "none", "proximal": "actor"}
    learner = Learner(config(folder, "full", learner_ranks=RANKS, loss=loss))
    assert agreed(learner.step(TrainBatch(one, 1.0))).bad == ""


def test_two_ranks_agree_on_bad_values(tmp_path: Path, on_ranks: RankProcesses) -> None:
    on_ranks(train_through_bad_values, make_text_model(tmp_path / "model", "qwen2"))


def test_bad_steps_end_a_run_and_it_resumes_from_the_last_good_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = ["run", "quickstart", *SHORT, "async_rl=false", "rollout.engine=torch", "eval=null", f"output_dir={folder}"]
    words += ["num_steps=6", "checkpoint.every=1", "checkpoint.keep=2", "max_bad_steps=2"]
    planted = ["loss._component_=planted.PlantedLoss", "loss.first=3", "loss.last=1000000"]
    assert main([*words, *planted]) == 1
    said = capfd.readouterr().err.splitlines()
    assert said[-1].startswith("2 bad steps in a row end the run (max_bad_steps=2), the last being step 5: loss is nan")
    assert said[-1].endswith("; resume_from_checkpoint=true continues from step_000003.")
    assert not any("Traceback" in line for line in said)
    rows = steps(read(folder))
    assert [row["learner/bad_step"] for row in rows] == [0, 0, 0, 1, 1]
    assert [row["loss/total"] is None for row in rows] == [False] * 3 + [True] * 2
    kept = sorted(f.name for f in (folder / "checkpoints").iterdir())
    assert kept == ["step_000002", "step_000003"]
    tensors = load_file(folder / "checkpoints" / "step_000003" / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert not (folder / "adapter").exists()

    assert main([*words, "resume_from_checkpoint=true"]) == 0
    assert [row["learner/bad_step"] for row in steps(read(folder))] == [0] * 6
    assert (folder / "adapter").exists()
