"""The reference policy of the KL term, computed with the learner's own model wherever only part of it is trained.

| trained | `loss.reference: initial` | `base` |
|---|---|---|
| a new adapter | adapters off | adapters off |
| an adapter from `model.adapter_path` | a frozen copy of that adapter's tensors, swapped in | adapters off |
| beside it, a whole vision tower | also a frozen copy of the tower | also a frozen copy of the base's tower |
| all weights | a frozen model | the same |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from learner.fsdp import reshard
from tora.adapters.inject import adapters_off, full_weight_parameters, refresh, row_norm_caches, trained_parameters
from tora.distributed.sharding import copy_full, from_local_rows, gather, local
from tora.errors import ConfigError
from tora.models.decoder import Decoder

_FILE = "reference.safetensors"


class Reference:
    """A model, with some of its tensors replaced and its adapters on or off while the reference is computed."""

    def __init__(
        self,
        model: Decoder,
        frozen: Mapping[str, torch.Tensor],
        *,
        adapters: bool = True,
        in_checkpoints: bool = False,
    ) -> None:
        """`frozen`: this rank's rows of the replaced parameters and buffers, by the model's own names.
        `in_checkpoints`: checkpoints hold them, because the files that they were read from may change."""
        self._model, self._frozen, self._adapters, self._in_checkpoints = model, frozen, adapters, in_checkpoints

    @contextmanager
    def policy(self) -> Iterator[Decoder]:
        """Within the context the yielded model computes the reference; afterwards it is what it was, bit for bit.

        Collective under FSDP2, and not for passes that need a gradient.
        """
        off = nullcontext() if self._adapters else adapters_off(self._model)
        with torch.no_grad(), off, _replaced(self._model, self._frozen):
            yield self._model

    def save(self, folder: Path, *, is_writer: bool) -> None:
        """Write what `restored` needs into an existing folder. Collective; the rank with `is_writer` writes."""
        if not self._in_checkpoints:
            return
        parameters = dict(self._model.named_parameters())
        frozen = {name: rows for name, rows in self._frozen.items() if name in parameters}
        full = gather({name: from_local_rows(rows, parameters[name]) for name, rows in frozen.items()})
        if is_writer:
            save_file({name: tensor.cpu().contiguous() for name, tensor in full.items()}, folder / _FILE)

    @torch.no_grad()
    def restored(self, folder: Path) -> Reference:
        """The reference of the run that wrote the checkpoint, whatever its files have become since.

        Leaves the model's trained weights undefined; collective. Raises ConfigError if other parameters were trained
        there.
        """
        if not self._in_checkpoints or not (folder / _FILE).is_file():
            return self
        parameters, saved = trained_parameters(self._model), load_file(folder / _FILE)
        if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in saved.items()}:
            raise ConfigError(f"the KL reference in checkpoint {str(folder)!r} does not fit this run's parameters")
        for name, parameter in parameters.items():
            copy_full(parameter, saved[name])
        refresh(self._model)
        return adapted_reference(self._model)


def base_reference(model: Decoder) -> Reference:
    """The base, of which the model has not been changed yet: adapters off, whatever is trained whole copied."""
    whole = {model.names.parameter_from_hf(name) for name in full_weight_parameters(model)}
    return Reference(model, _copies(model, trained_parameters(model).keys() & whole), adapters=False)


def adapted_reference(model: Decoder) -> Reference:
    """The model as it is now, adapters included."""
    frozen = _copies(model, [*trained_parameters(model), *row_norm_caches(model)])
    return Reference(model, frozen, in_checkpoints=True)


def _tensors(model: Decoder) -> dict[str, torch.Tensor]:
    """This rank's rows of all parameters and buffers; writing to them changes the model."""
    return {name: local(t.detach()) for name, t in (*model.named_parameters(), *model.named_buffers())}


def _copies(model: Decoder, names: Iterable[str]) -> dict[str, torch.Tensor]:
    tensors = _tensors(model)
    return {name: tensors[name].clone() for name in names}


@contextmanager
def _replaced(model: Decoder, frozen: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the context the model has the frozen tensors. Swapped in place, so that compiled code and FSDP2 see them;
    FSDP2 may hold full weights gathered from the previous values, hence `reshard`."""
    if not frozen:
        yield
        return
    reshard(model)
    tensors, current = _tensors(model), _copies(model, frozen)
    for name, value in frozen.items():
        tensors[name].copy_(value)
    try:
        yield
    finally:
        reshard(model)
        tensors = _tensors(model)
        for name, value in current.items():
            tensors[name].copy_(value)
