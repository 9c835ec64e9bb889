"""Load a decoder from a Hugging Face folder, streaming its weights from safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torchtune.modules import TiedLinear

from tora.errors import ConfigError
from tora.models.decoder import Decoder, RMSNorm, RotaryTable, build_decoder
from tora.models.family import families
from tora.models.quantize import FrozenLinear, is_quantized, quantize


def read_config(folder: Path) -> Any:
    """transformers' config object. Raises ConfigError if the folder has no config.json or an unsupported family."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path {str(folder)!r} holds no config.json; `tune download` fetches a model")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in families():
        raise ConfigError(
            f"model_type {config.model_type!r} of {str(folder)!r} is not supported; {', '.join(families())} are"
        )
    return config


def shard_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, by its index if it has one. Raises ConfigError if there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ConfigError(f"model.path {str(folder)!r} holds no safetensors file, the only format that Tora reads")


def side_files(folder: Path) -> list[Path]:
    """The files besides weights: config, tokenizer, chat template, index."""
    return [file for file in folder.iterdir() if file.suffix in (".json", ".jinja", ".txt", ".model")]


_HEAD = "lm_head.weight"
_ROWS = 4096


def is_derived(hf_name: str, *, tied: bool) -> bool:
    """Whether a tensor, though stored in some folders, is computed from the rest of the model."""
    return hf_name.endswith("rotary_emb.inv_freq") or (tied and hf_name == _HEAD)


def stream_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Pairs of Hugging Face name and CPU tensor, read one at a time."""
    with safe_open(file, framework="pt") as shard:
        for name in shard.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
            yield name, shard.get_tensor(name)


def build_model(config: Any, linear: type[nn.Linear] = nn.Linear) -> Decoder:
    """A model on the default device, weights uninitialised.

    `config`: transformers' config object. `linear`: the class of the decoder layers' linear modules, not of the head.
    Raises ConfigError if the config is not supported.
    """
    family = families()[config.model_type]
    return (family.build or build_decoder)(config, family, linear)


def empty_decoder(folder: Path, *, dtype: torch.dtype, device: torch.device, quantize_base: bool = False) -> Decoder:
    """The model that config.json describes, frozen, with parameters on the meta device and buffers on `device`.

    Raises ConfigError if it is not supported.
    """
    with torch.device("meta"):
        model = build_model(read_config(folder), FrozenLinear if quantize_base else nn.Linear).to(dtype)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.float()  # torch's fused kernel expects the scale in the dtype it computes in
        if isinstance(module, RotaryTable):
            with torch.device(device):
                module.reset()
    return model.requires_grad_(False)


def fill_decoder(
    model: Decoder,
    folder: Path,
    *,
    device: torch.device,
    quantize_base: bool = False,
    on_loaded: Callable[[nn.Module], None] = lambda unit: None,
) -> None:
    """Replace every parameter with the folder's tensor, cast to the parameter's dtype, on `device`.

    Loads layer by layer, then the parameters outside layers. `on_loaded` is called with each layer as soon as it is
    loaded, and finally with the model. If it shards its argument, a rank never holds more than one full layer; if the
    base is quantised, never more than one unquantised weight.
    Raises ConfigError if a tensor is unknown, missing, of another shape, or cannot be quantised to NF4.
    """
    names = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    with ExitStack() as files:
        sources = _sources(model, folder, files)
        for unit in [*chain(*model.stacks()), model]:
            for name in [name for name in sources if name.startswith(names[unit])]:
                file, hf_name = sources.pop(name)
                empty = model.get_parameter(name)
                # a copy, since the tensor may alias the mapped file
                value = file.get_tensor(hf_name).to(device, empty.dtype, copy=True)
                if quantize_base and is_quantized(name):
                    value = quantize(value, hf_name)
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=empty.requires_grad))
            on_loaded(unit)


def _sources(model: Decoder, folder: Path, files: ExitStack) -> dict[str, tuple[Any, str]]:
    """For each parameter but the adapters': the open file that holds it, and its name there."""
    parameters = dict(model.named_parameters())
    missing = {name for name in parameters if ".lora_" not in name and not name.endswith(".magnitude")}
    tied, sources, stored_heads = isinstance(model.output, TiedLinear), {}, []
    for path in shard_files(folder):
        file = files.enter_context(safe_open(path, framework="pt"))
        for hf_name in file.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
            if is_derived(hf_name, tied=tied):
                stored_heads += [file.get_slice(hf_name)] if hf_name == _HEAD else []
                continue
            name = model.names.parameter_from_hf(hf_name)
            if name is None or name not in parameters:
                raise ConfigError(
                    f"tensor {hf_name!r} of {str(folder)!r} does not belong to the model that config.json describes"
                )
            shape = tuple(file.get_slice(hf_name).get_shape())
            if parameters[name].shape != shape:
                raise ConfigError(
                    f"tensor {hf_name!r} of {str(folder)!r} has shape {shape}, "
                    f"config.json asks for {tuple(parameters[name].shape)}"
                )
            sources[name] = file, hf_name
    missing -= sources.keys()
    if missing == {"output.weight"}:
        raise ConfigError(
            f"config.json of {str(folder)!r} has tie_word_embeddings=false, and its files hold no {_HEAD}; set it to "
            "true if the head is the embedding"
        )
    if missing:
        first = model.names.parameter_to_hf(sorted(missing)[0])
        raise ConfigError(f"{str(folder)!r} lacks {len(missing)} tensors of its model, e.g. {first!r}")
    for head in stored_heads:
        file, hf_name = sources["tok_embeddings.weight"]
        if not _equal(head, file.get_slice(hf_name), model.tok_embeddings.weight.dtype):
            raise ConfigError(
                f"config.json of {str(folder)!r} has tie_word_embeddings=true, and its files hold a {_HEAD} that "
                "differs from the embedding; set it to false, so that every library uses that head"
            )
    return sources


def _equal(a: Any, b: Any, dtype: torch.dtype) -> bool:
    """Whether two matrices in open files are equal once they are cast to `dtype`; reads some rows at a time."""
    if a.get_shape() != b.get_shape():
        return False
    starts = range(0, a.get_shape()[0], _ROWS)
    return all(torch.equal(*(m[row : row + _ROWS].to(dtype) for m in (a, b))) for row in starts)


def load_decoder(folder: Path, *, dtype: torch.dtype, device: torch.device, quantize_base: bool = False) -> Decoder:
    """`empty_decoder` and `fill_decoder` in one: a frozen model on `device`, in NF4 if `quantize_base`."""
    model = empty_decoder(folder, dtype=dtype, device=device, quantize_base=quantize_base)
    fill_decoder(model, folder, device=device, quantize_base=quantize_base)
    return model
