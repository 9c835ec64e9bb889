"""A learner's checkpoint: trained weights, optimizer, schedule, RNG. Only safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from learner.optim import OptimizerSettings, plain, restore_settings
from learner.optimizer_state import OptimizerState, full_state, restore_state
from tora.distributed.sharding import copy_full, gather
from tora.errors import ConfigError

_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "learner.json"


def training_state_files(
    *,
    version: int,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    settings: OptimizerSettings,
    is_writer: bool,
) -> Callable[[Path], None]:
    """Collective. Copies the state to the host; the result writes it into a folder, at any time and in any thread. The
    rank with `is_writer` has full tensors, so that any number of ranks can resume from them; others write nothing."""
    state, full = full_state(optimizer), gather(parameters)
    if not is_writer:
        return lambda folder: None
    weights, tensors = _copies(full), {**_copies(state.tensors), "rng": torch.get_rng_state()}
    document = {
        "version": version,
        "param_groups": plain(optimizer.state_dict()["param_groups"]),
        "optimizer_values": state.values,
        "schedule": {k: v for k, v in plain(schedule.state_dict()).items() if k != "lr_lambdas"},
        "settings": asdict(settings),
    }
    text = json.dumps(document)

    def write(folder: Path) -> None:
        save_file(weights, folder / _WEIGHTS)
        save_file(tensors, folder / _OPTIMIZER)
        (folder / _STATE).write_text(text)

    return write


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the host, which the next step does not change. Tensors that share memory, as bitsandbytes' maps do, which
    safetensors refuses, no longer do."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def load_training_state(
    folder: Path,
    *,
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    settings: OptimizerSettings,
) -> int:
    """Restore everything in place, optimizer and schedule being newly built, and return the policy version. Collective.

    Raises ConfigError if the run trains other parameters, or with another optimizer, than those of the checkpoint.
    """
    document = json.loads((folder / _STATE).read_text())
    weights, tensors = load_file(folder / _WEIGHTS), load_file(folder / _OPTIMIZER)
    _check_parameters(folder, weights, parameters)
    before = OptimizerSettings(**document["settings"]) if "settings" in document else None
    if before is not None and before.optimizer["_component_"] != settings.optimizer["_component_"]:
        was, now = before.optimizer["_component_"], settings.optimizer["_component_"]
        raise ConfigError(f"optimizer._component_={now} cannot continue from checkpoint {folder}, written with {was}.")
    rng = tensors.pop("rng")
    try:
        restore_state(optimizer, OptimizerState(tensors, document.get("optimizer_values", {})))
    except ValueError as error:
        raise ConfigError(f"checkpoint {folder} cannot restore this run's optimizer: {error}.") from error
    restore_settings(
        optimizer,
        schedule,
        document["param_groups"],
        document["schedule"],
        before=before,
        now=settings,
        version=document["version"],
    )
    for name, parameter in parameters.items():
        copy_full(parameter, weights[name])
    torch.set_rng_state(rng)
    return int(document["version"])


@torch.no_grad()
def load_weights(folder: Path, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Only the trained weights of a checkpoint, in place, cast to the parameters' dtypes. Raises ConfigError if the
    checkpoint has other parameters."""
    weights = load_file(folder / _WEIGHTS)
    _check_parameters(folder, weights, parameters)
    for name, parameter in parameters.items():
        copy_full(parameter, weights[name])


def _check_parameters(
    folder: Path, weights: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.nn.Parameter]
) -> None:
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise ConfigError(f"checkpoint {folder} and this run train different parameters, e.g. {odd[0]!r}.")
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            was, now = (tuple(tensor.shape) for tensor in (weights[name], parameter))
            raise ConfigError(f"checkpoint {folder} has {name} in the shape {was}, and this run trains it in {now}.")
