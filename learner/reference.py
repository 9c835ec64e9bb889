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
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from learner.fsdp import reshard
from tora.adapters.inject import adapters_off, full_weight_parameters, refresh, row_norm_caches, trained_parameters
from tora.distributed.sharding import copy_full, from_local_rows, gather, local
from tora.errors import ConfigError
from tora.models.base import Decoder

_FILE = "reference.safetensors"


class Reference:
    """A model, with some of its tensors replaced and its adapters on or off while the reference is computed."""

    def __init__(
        self, model: Decoder, names: Iterable[str] = (), *, adapters: bool = True, in_checkpoints: bool = False
    ) -> None:
        """`names`: parameters and buffers that the reference has as they are now. `in_checkpoints`: checkpoints hold
        them, because the files that they were read from may change."""
        self._model, self._adapters, self._in_checkpoints = model, adapters, in_checkpoints
        state = dict[str, torch.Tensor](chain(model.named_parameters(), model.named_buffers()))
        # kept, because after a forward pass FSDP2 may show the model's full weights in place of its rows
        self._live = {name: state[name] for name in names}
        self._frozen = self._copy()

    def _copy(self) -> dict[str, torch.Tensor]:
        """This rank's rows of the tensors, as they are now."""
        return {name: local(tensor.detach()).clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def _set(self, rows: Mapping[str, torch.Tensor]) -> None:
        """In place, so that compiled code sees it, and FSDP2, which may hold weights gathered before."""
        reshard(self._model)
        for name, tensor in self._live.items():
            local(tensor).copy_(rows[name])

    @contextmanager
    def policy(self) -> Iterator[Decoder]:
        """Within the context the yielded model computes the reference; afterwards it is what it was, bit for bit.

        Collective under FSDP2, and not for passes that need a gradient.
        """
        current = self._copy()
        off = nullcontext() if self._adapters else adapters_off(self._model)
        with torch.no_grad(), off:
            if current:
                self._set(self._frozen)
            try:
                yield self._model
            finally:
                if current:
                    self._set(current)

    def _parameters(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self._live.items() if isinstance(tensor, nn.Parameter)}

    def save(self, folder: Path, *, is_writer: bool) -> None:
        """Write what `restore` needs into an existing folder. Collective; the rank with `is_writer` writes."""
        if not self._in_checkpoints:
            return
        full = gather({name: from_local_rows(self._frozen[name], p) for name, p in self._parameters().items()})
        if is_writer:
            save_file({name: tensor.cpu().contiguous() for name, tensor in full.items()}, folder / _FILE)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Become the reference of the run that wrote the checkpoint, even if the files that it came from have changed.

        Leaves the model's trained weights undefined; collective. Raises ConfigError if other parameters were trained
        there.
        """
        if not self._in_checkpoints or not (folder / _FILE).is_file():
            return
        parameters, saved = self._parameters(), load_file(folder / _FILE)
        if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in saved.items()}:
            raise ConfigError(f"the KL reference in checkpoint {str(folder)!r} does not fit this run's parameters")
        reshard(self._model)
        for name, parameter in parameters.items():
            copy_full(parameter, saved[name])
        refresh(self._model)
        self._frozen = self._copy()


def base_reference(model: Decoder) -> Reference:
    """The base model: adapters off, and copies of the full-weight parameters. Call before any of them has changed."""
    whole = {model.names.parameter_from_hf(name) for name in full_weight_parameters(model)}
    return Reference(model, trained_parameters(model).keys() & whole, adapters=False)


def adapted_reference(model: Decoder) -> Reference:
    """The model as it is now, adapters included."""
    return Reference(model, [*trained_parameters(model), *row_norm_caches(model)], in_checkpoints=True)
