"""Checkpoints of any torch optimizer on several ranks, and from one number of ranks to another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learners import config, make_batch, make_groups
from ranks import RANKS, RankProcesses
from tiny import make_text_model

from learner.learner import Learner
from tora.adapters.snapshot import unpack
from tora.errors import ConfigError

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"_component_": "torch.optim.SGD", "lr": 1e-2, "momentum": 0.9},
    "muon": {"_component_": "torch.optim.Muon", "lr": 1e-3},
    "adamw8bit": {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3, "block_size": 64},
}
ATOL = {"momentum": 1e-6, "muon": 2e-3, "adamw8bit": 1e-6}
"""One step on two ranks against the same step on one; Muon makes its step, of up to 0.05, in bf16."""
LORA_TYPES = {"momentum": "lora", "muon": "lora", "adamw8bit": "full"}
"""torchao quantises no state of fewer than 4096 elements, as adapters have here."""


def learner(folder: Path, name: str, ranks: int) -> Learner:
    return Learner(config(folder, LORA_TYPES[name], optimizer=OPTIMIZERS[name], learner_ranks=ranks))


def batches(ranks: int, *seeds: int) -> list[Any]:
    return [make_batch(make_groups(4, seed=seed), capacity=60, num_ranks=ranks) for seed in seeds]


def snapshots(trained: Learner) -> dict[str, torch.Tensor]:
    return unpack(trained.snapshot())


def check_on_ranks(folder: Path, by_one: Path, out: Path) -> None:
    """An unbroken and a resumed run are equal; then resumes from what one rank wrote."""
    for name in OPTIMIZERS:
        with torch.compiler.set_stance("force_eager"):
            unbroken = learner(folder, name, RANKS)
            for batch in batches(RANKS, 0, 1):
                unbroken.step(batch)
            (out / name).mkdir(parents=True, exist_ok=True)
            unbroken.save(out / name)
            resumed = learner(folder, name, RANKS)
            resumed.restore(out / name)
            for batch in batches(RANKS, 2):
                assert unbroken.step(batch) == resumed.step(batch), name
            mine, theirs = snapshots(unbroken), snapshots(resumed)
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items()), name
            continued = learner(folder, name, RANKS)
            continued.restore(by_one / name)
            continued.step(*batches(RANKS, 2))
            after = snapshots(continued)
            if continued.world.rank == 0:
                torch.save({"unbroken": mine, "continued": after}, out / name / "seen.pt")
    with pytest.raises(ConfigError, match=r"Adafactor cannot train weights that are sharded over ranks: .*placement"):
        Learner(config(folder, optimizer={"_component_": "torch.optim.Adafactor", "lr": 1e-2}, learner_ranks=RANKS))


def test_any_optimizer_resumes_on_any_number_of_ranks(tmp_path: Path, on_ranks: RankProcesses) -> None:
    folder, by_one, by_two = make_text_model(tmp_path / "model"), tmp_path / "one", tmp_path / "two"
    one: dict[str, Learner] = {}
    for name in OPTIMIZERS:
        with torch.compiler.set_stance("force_eager"):
            one[name] = learner(folder, name, 1)
            for batch in batches(1, 0, 1):
                one[name].step(batch)
            (by_one / name).mkdir(parents=True)
            one[name].save(by_one / name)
            one[name].step(*batches(1, 2))
    on_ranks(check_on_ranks, folder, by_one, by_two)
    for name in OPTIMIZERS:
        seen = torch.load(by_two / name / "seen.pt")
        with torch.compiler.set_stance("force_eager"):
            resumed = learner(folder, name, 1)
            resumed.restore(by_two / name)
            resumed.step(*batches(1, 2))
        compare(seen["continued"], snapshots(one[name]), name)  # written by one rank, read by two
        compare(snapshots(resumed), seen["unbroken"], name)  # written by two, read by one


def compare(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], name: str) -> None:
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], atol=ATOL[name], rtol=0, msg=f"{name} {key}")
