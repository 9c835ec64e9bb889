"""Where in a folder's files the parameters of a model of transformers are, by transformers' own rules.

Some models have other names in files than in memory, and mixtures of experts keep the experts of a layer as one
tensor. transformers lists these conversions, for loading any folder of the model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tora.errors import ConfigError
from tora.models.generic import GenericDecoder
from tora.models.sources import HEAD, Source, check_complete, check_shape, check_tied, is_derived, own_parameters


def generic_sources(model: GenericDecoder, folder: Path, files: Sequence[Any]) -> dict[str, Source]:
    """For each parameter but the adapters': where its tensor is. Raises ConfigError as `fill_decoder` does."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = conversions(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = dict(model.named_parameters())
    known = {model.names.parameter_to_hf(name): p for name, p in parameters.items()}
    stored = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (a handle is not iterable)
    merged: dict[str, tuple[Any, list[str]]] = {}
    sources: dict[str, Source] = {}
    head = None
    for hf_name in sorted(stored, key=dot_natural_key):
        file = stored[hf_name]
        if is_derived(hf_name, tied=model.is_tied):
            head = file.get_slice(hf_name) if hf_name == HEAD else head
            continue
        prefix = model.hf.base_model_prefix
        target, pattern = rename_source_key(hf_name, renamings, converters, prefix, known)
        if target not in known:
            target, pattern = rename_source_key(hf_name, [], [], prefix, known)
        if target not in known:
            if _is_ignored(model.hf, hf_name):
                continue
            raise ConfigError(
                f"tensor {hf_name!r} of {str(folder)!r} does not belong to the model that config.json describes"
            )
        name = model.names.parameter_from_hf(target)
        read = partial(file.get_tensor, hf_name)
        if pattern is None:
            check_shape(hf_name, tuple(file.get_slice(hf_name).get_shape()), known[target], folder)
            sources[name] = Source(hf_name, read, file.get_slice(hf_name))
            continue
        converter, _ = merged.setdefault(target, (deepcopy(by_pattern[pattern]), []))
        converter.add_tensor(target, hf_name, pattern, read)
        sources[name] = Source(target, partial(_convert, model, converter, target, known[target], folder))
    check_complete(model, own_parameters(parameters) - sources.keys(), folder)
    embedding = next(name for name, p in parameters.items() if p is model.embedding)
    if head is not None:
        check_tied(head, sources[embedding].rows, model.embedding.dtype, folder)
    return sources


def conversions(model: GenericDecoder) -> list[Any]:
    """transformers' conversions between a folder's tensors and the model's parameters."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model.hf, add_legacy=False)


def _convert(model: GenericDecoder, converter: Any, target: str, parameter: torch.Tensor, folder: Path) -> torch.Tensor:
    try:
        converted = converter.convert(target, model=model.hf, config=model.hf.config)[target]
    except (RuntimeError, KeyError) as error:
        raise ConfigError(f"{target!r} cannot be read from the tensors of {str(folder)!r}: {error}") from None
    tensor = converted[0] if isinstance(converted, list) else converted
    check_shape(target, tuple(tensor.shape), parameter, folder)
    return tensor


def _is_ignored(hf: Any, hf_name: str) -> bool:
    return any(re.search(pattern, hf_name) for pattern in hf._keys_to_ignore_on_load_unexpected or ())
