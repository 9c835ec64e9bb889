"""What a learner needs to go on: trained weights, optimizer, schedule, RNG. Only safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "learner.json"


def save_training_state(
    folder: Path,
    *,
    version: int,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
) -> None:
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": value.detach().cpu().contiguous()
        for index, slot in state["state"].items()
        for key, value in slot.items()
    }
    save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, folder / _WEIGHTS)
    save_file({**tensors, "rng": torch.get_rng_state()}, folder / _OPTIMIZER)
    document = {
        "version": version,
        "param_groups": state["param_groups"],
        "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
    }
    (folder / _STATE).write_text(json.dumps(document))


@torch.no_grad()
def load_training_state(
    folder: Path,
    *,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
) -> int:
    """Restores all of it in place; answers the policy version.

    Errors: ValueError where the checkpoint holds other parameters than the run trains.
    """
    document = json.loads((folder / _STATE).read_text())
    weights = load_file(folder / _WEIGHTS)
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise ValueError(f"checkpoint {folder} and this run train different parameters, e.g. {odd[0]!r}")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    tensors = load_file(folder / _OPTIMIZER)
    torch.set_rng_state(tensors.pop("rng"))
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        slots.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": document["param_groups"]})
    schedule.load_state_dict({**schedule.state_dict(), **document["schedule"]})
    return int(document["version"])
