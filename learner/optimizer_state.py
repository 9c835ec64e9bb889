"""The state of any torch optimizer as full tensors and plain values, and back onto any number of ranks.

Optimizers keep their state in several forms: tensors like the parameter, sharded as it is (Adam), smaller ones
(Adafactor's rows and columns), blocks of quantised values (torchao's 8-bit Adam), numbers, or None. What an optimizer
keeps where is known only to itself, so `restore_state` lets it take one step with gradients of zero and then overwrites
the state that this made.

Quantised blocks are saved as they are. They are restored exactly if a rank's rows start and end at the edges of blocks,
and requantised otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from tora.distributed.process_group import gather_objects
from tora.distributed.sharding import gather, local, local_rows

_PART = ":"
"""Between the name of a quantised tensor and that of one of its parts."""
_CODES, _SCALE, _MAP = "codes", "scale", "qmap"
"""The parts of torchao's low-bit state: the values, two of which may share a byte; a factor for each block of them;
and, unless the values are float8, the map that they are indices into."""
Slots = dict[str, dict[str, Any]]
"""By index of the parameter and name."""


@dataclass(frozen=True, slots=True)
class OptimizerState:
    tensors: dict[str, torch.Tensor]
    """Full, by `INDEX.NAME`; a quantised tensor as its parts, by `INDEX.NAME:PART`."""
    values: Slots
    """Numbers and None."""


def full_state(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """The whole state, on every rank. Collective. Raises TypeError for a value that JSON cannot hold."""
    rows: dict[str, torch.Tensor] = {}
    tensors: dict[str, torch.Tensor] = {}
    values: Slots = {}
    # not `state_dict`, in which bitsandbytes nests a part of its state
    slots = {i: optimizer.state[p] for i, p in enumerate(_parameters(optimizer)) if p in optimizer.state}
    quantised = _quantised_names(slots)
    for index, slot in slots.items():
        for key, value in slot.items():
            name = f"{index}.{key}"
            if not isinstance(value, torch.Tensor):
                json.dumps(value)
                values.setdefault(str(index), {})[key] = value
            elif name in quantised:
                tensors |= _parts_of_all_ranks(name, local(value))
            elif isinstance(value, DTensor) and value.placements != (Shard(0),):
                tensors[name] = value.full_tensor()
            else:
                rows[name] = value
    return OptimizerState({**tensors, **gather(rows)}, values)


def restore_state(optimizer: torch.optim.Optimizer, saved: OptimizerState) -> None:
    """Overwrite the optimizer's state. It takes a step first: restore its parameters and the random state afterwards.

    Raises ValueError if the state is that of another optimizer. Collective.
    """
    slots = _slots(saved)
    if slots:
        _take_empty_step(optimizer)
    for index, parameter in enumerate(_parameters(optimizer)):
        slot = slots.get(str(index))
        if slot is None:
            optimizer.state.pop(parameter, None)  # it has not had a gradient yet
            continue
        state = optimizer.state[parameter]
        if state.keys() != slot.keys():
            raise ValueError(f"it keeps {_words(state)} for each parameter, and the checkpoint has {_words(slot)}")
        for key, value in slot.items():
            if isinstance(state[key], torch.Tensor):
                _overwrite(state[key], value)
            else:
                state[key] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _take_empty_step(optimizer: torch.optim.Optimizer) -> None:
    for parameter in _parameters(optimizer):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _slots(saved: OptimizerState) -> Slots:
    """By parameter; a quantised tensor is a dict of its parts."""
    slots = {index: dict(values) for index, values in saved.values.items()}
    for name, tensor in saved.tensors.items():
        index, _, key = name.partition(".")
        key, _, part = key.partition(_PART)
        slot = slots.setdefault(index, {})
        if part:
            slot.setdefault(key, {})[part] = tensor
        else:
            slot[key] = tensor
    return slots


def _words(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _quantised_names(slots: Mapping[int, Mapping[str, Any]]) -> set[str]:
    """Of the tensors that some rank holds quantised. Collective."""
    named = ((f"{index}.{key}", value) for index, slot in slots.items() for key, value in slot.items())
    own = {name for name, value in named if isinstance(value, torch.Tensor) and _is_quantised(local(value))}
    return set().union(*gather_objects(own))


def _is_quantised(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, _CODES) and hasattr(tensor, _SCALE)


def _parts(tensor: Any) -> dict[str, torch.Tensor]:
    return {part: getattr(tensor, part) for part in (_CODES, _SCALE, _MAP) if hasattr(tensor, part)}


def _parts_of_all_ranks(name: str, mine: Any) -> dict[str, torch.Tensor]:
    """The parts of the full tensor; or the full tensor in float32, if some rank's rows are not quantised."""
    parts = _parts(mine)
    # as bytes, since float8 does not pickle
    pieces = gather_objects({k: v.detach().cpu().contiguous().view(torch.uint8) for k, v in parts.items()})
    if not all(pieces):
        own = mine.dequantize() if _is_quantised(mine) else mine
        return {name: torch.cat(gather_objects(own.detach().float().cpu()))}
    whole = {k: v if k == _MAP else torch.cat([piece[k] for piece in pieces]) for k, v in pieces[0].items()}
    return {f"{name}{_PART}{part}": tensor.view(parts[part].dtype) for part, tensor in whole.items()}


def _overwrite(target: torch.Tensor, saved: torch.Tensor | dict[str, torch.Tensor]) -> None:
    """Copy this rank's part of `saved`, a full tensor or the parts of a quantised one."""
    own = local(target)
    if isinstance(saved, dict):
        if _is_quantised(own) and _copy_parts(own, target, saved):
            return
        saved = _dequantised(saved, target.shape)
    if saved.shape != target.shape:
        raise ValueError(
            f"its state has the shape {tuple(target.shape)} where the checkpoint's has {tuple(saved.shape)}"
        )
    if isinstance(target, DTensor) and target.placements == (Shard(0),):
        own.copy_(local_rows(saved, target))
    elif not isinstance(target, DTensor) or target.placements == (Replicate(),):
        own.copy_(saved)
    else:
        raise ValueError(f"its state has the layout {target.placements}, which a checkpoint cannot restore")


def _copy_parts(own: torch.Tensor, target: torch.Tensor, saved: dict[str, torch.Tensor]) -> bool:
    """Copy this rank's part of each; False if its rows do not start and end at the edges of saved blocks."""
    count, parts = target.numel(), _parts(own)
    start = int(local_rows(torch.arange(target.shape[0]), target)[:1].sum()) * (count // target.shape[0])
    blocks = saved[_SCALE].numel()
    if parts.keys() != saved.keys() or start * blocks % count or own.numel() * blocks != parts[_SCALE].numel() * count:
        return False
    for part, tensor in parts.items():
        if part != _MAP:
            size = saved[part].numel()
            rows = saved[part].flatten()[start * size // count : (start + own.numel()) * size // count]
            tensor.copy_(rows.view(tensor.shape))
    return True


def _dequantised(saved: dict[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    codes, scale = saved[_CODES].flatten(), saved[_SCALE]
    if len(codes) * 2 == shape.numel():
        codes = torch.stack([codes >> 4, codes & 0b1111], -1)
    values = saved[_MAP][codes.long()] if _MAP in saved else codes.float()
    return (values.view(len(scale), -1) * scale[:, None]).view(shape)
