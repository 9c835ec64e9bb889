"""A learner's checkpoint: trained weights, optimizer, schedule, RNG. Only safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from tora.distributed.sharding import copy_full, from_local_rows, gather, local_rows

_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "learner.json"


def save_training_state(
    folder: Path,
    *,
    version: int,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    is_writer: bool,
) -> None:
    """Collective; the rank with `is_writer` writes full tensors, so that any number of ranks can resume from them."""
    state = optimizer.state_dict()
    slots = {f"{index}.{key}": value for index, slot in state["state"].items() for key, value in slot.items()}
    weights, moments = _on_cpu(gather(parameters)), _on_cpu(gather(slots))
    if not is_writer:
        return
    save_file(weights, folder / _WEIGHTS)
    save_file({**moments, "rng": torch.get_rng_state()}, folder / _OPTIMIZER)
    document = {
        "version": version,
        "param_groups": state["param_groups"],
        "schedule": {k: v for k, v in schedule.state_dict().items() if k != "lr_lambdas"},
    }
    (folder / _STATE).write_text(json.dumps(document))


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def load_training_state(
    folder: Path,
    *,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
) -> int:
    """Restore everything in place and return the policy version.

    Raises ValueError if the run trains other parameters than those in the checkpoint.
    """
    document = json.loads((folder / _STATE).read_text())
    weights = load_file(folder / _WEIGHTS)
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise ValueError(f"checkpoint {folder} and this run train different parameters, e.g. {odd[0]!r}")
    for name, parameter in parameters.items():
        copy_full(parameter, weights[name])
    tensors = load_file(folder / _OPTIMIZER)
    torch.set_rng_state(tensors.pop("rng"))
    trained = list(parameters.values())
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        parameter = trained[int(index)]
        # a moment is sharded like its parameter; a step count is a scalar
        sharded = tensor.ndim > 0 and isinstance(parameter, DTensor)
        part = from_local_rows(local_rows(tensor, parameter), parameter) if sharded else tensor
        slots.setdefault(int(index), {})[key] = part
    optimizer.load_state_dict({"state": slots, "param_groups": document["param_groups"]})
    schedule.load_state_dict({**schedule.state_dict(), **document["schedule"]})
    return int(document["version"])
