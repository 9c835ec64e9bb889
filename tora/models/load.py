"""Load a decoder from a Hugging Face folder, streaming its weights from safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torchtune.modules import TiedLinear

from tora.config.schema import Implementation
from tora.errors import ConfigError, first_line
from tora.models.base import Decoder
from tora.models.decoder import NativeDecoder, RMSNorm, RotaryTable, build_decoder, native_gap
from tora.models.family import families
from tora.models.generic import GenericDecoder
from tora.models.generic_build import build_generic, cast_parameters, compute_buffers
from tora.models.generic_load import generic_sources
from tora.models.quantize import FrozenLinear, quantize
from tora.models.sources import HEAD, Source, check_complete, check_shape, check_tied, is_derived, own_parameters
from tora.models.weight_files import open_weights


def read_config(folder: Path) -> Any:
    """transformers' config object. Raises ConfigError if the folder has no config.json, or one that the installed
    transformers does not know."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.path {str(folder)!r} holds no config.json; `tune download` fetches a model")
    from transformers import AutoConfig

    fields = _read_json(folder / "config.json")
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(
            f"model.path {str(folder)!r} cannot be trained: its weights are quantised ({method}); use the original "
            "ones, with model.quantize_base=true for NF4"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except ValueError as error:
        kind = fields.get("model_type")
        if kind is None:
            lacks = f"config.json of {str(folder)!r} has no model_type; copy it from the model's page"
            raise ConfigError(lacks) from error
        raise ConfigError(
            f"model_type {kind!r} of {str(folder)!r} is not known to transformers {_transformers_version()}"
        ) from error
    except Exception as error:  # the library raises errors of many kinds for values that it does not expect
        raise ConfigError(f"config.json of {str(folder)!r} cannot be used: {first_line(error)}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{str(file)!r} is no JSON: {first_line(error)}; download it again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{str(file)!r} holds a {type(found).__name__}, expected names and values; download it again")
    return found


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


def implementation_of(config: Any, choice: Implementation = "auto") -> Literal["native", "transformers"]:
    """Which code runs a model: ours where it can, else transformers'. Raises ConfigError if `choice` cannot."""
    if choice == "transformers":
        return choice
    family = families().get(config.model_type)
    if family is None:
        gap = f"model_type {config.model_type!r} is none of {', '.join(families())}"
    else:
        gap = native_gap(config.get_text_config())
    if gap is None:
        return "native"
    if choice == "native":
        raise ConfigError(f"model.implementation=native does not support the model: {gap}")
    return "transformers"


def shard_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, by its index if it has one. Raises ConfigError if there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")):
        raise ConfigError(
            f"model.path {str(folder)!r} holds its weights in .bin files, which can run code as they are read; convert "
            "them with python -c 'import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            "[x.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2]) for x in (M, T)]' FOLDER NEW_FOLDER"
        )
    raise ConfigError(f"model.path {str(folder)!r} holds no safetensors file, the only format that Tora reads")


def side_files(folder: Path) -> list[Path]:
    """The files besides weights: config, tokenizer, chat template, index."""
    return [file for file in folder.iterdir() if file.suffix in (".json", ".jinja", ".txt", ".model")]


def stream_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Pairs of Hugging Face name and CPU tensor, read one at a time."""
    with open_weights(file) as shard:
        for name in shard.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
            yield name, shard.get_tensor(name)


def build_model(config: Any, linear: type[nn.Linear] = nn.Linear) -> NativeDecoder:
    """A model of ours on the default device, weights uninitialised.

    `config`: transformers' config object. `linear`: the class of the decoder layers' linear modules, not of the head.
    Raises ConfigError if the config is not supported.
    """
    implementation_of(config, "native")
    family = families()[config.model_type]
    return (family.build or build_decoder)(config, family, linear)


def empty_decoder(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize_base: bool = False,
    implementation: Implementation = "auto",
) -> Decoder:
    """The model that config.json describes, frozen, with parameters on the meta device and buffers on `device`.

    Raises ConfigError if it is not supported.
    """
    config, linear = read_config(folder), FrozenLinear if quantize_base else nn.Linear
    if implementation_of(config, implementation) == "transformers":
        model = build_generic(config, linear)
        cast_parameters(model, dtype)
        compute_buffers(model, device)
        return model.requires_grad_(False)
    with torch.device("meta"):
        model = build_model(config, linear).to(dtype)
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
    quantizable = model.quantizable()
    with ExitStack() as files:
        opened = [files.enter_context(open_weights(path)) for path in shard_files(folder)]
        if isinstance(model, GenericDecoder):
            sources = generic_sources(model, folder, opened)
        else:
            assert isinstance(model, NativeDecoder)
            sources = _sources(model, folder, opened)
        for unit in [*chain(*model.stacks()), model]:
            for name in [name for name in sources if name.startswith(names[unit])]:
                source, empty = sources.pop(name), model.get_parameter(name)
                # a copy, since the tensor may alias the mapped file
                value = source.read().to(device, empty.dtype, copy=True)
                if quantize_base and name in quantizable:
                    value = quantize(value, source.hf_name)
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=empty.requires_grad))
            on_loaded(unit)


def _sources(model: NativeDecoder, folder: Path, files: Sequence[Any]) -> dict[str, Source]:
    """For each parameter but the adapters': where its tensor is."""
    parameters = dict(model.named_parameters())
    missing = own_parameters(parameters)
    tied, sources, stored_heads = isinstance(model.output, TiedLinear), {}, []
    for file in files:
        for hf_name in file.keys():  # noqa: SIM118  (a safetensors handle is not iterable)
            if is_derived(hf_name, tied=tied):
                stored_heads += [file.get_slice(hf_name)] if hf_name == HEAD else []
                continue
            name = model.names.parameter_from_hf(hf_name)
            if name is None or name not in parameters:
                raise ConfigError(
                    f"tensor {hf_name!r} of {str(folder)!r} does not belong to the model that config.json describes"
                )
            shape = tuple(file.get_slice(hf_name).get_shape())
            check_shape(hf_name, shape, parameters[name], folder)
            sources[name] = Source(hf_name, partial(file.get_tensor, hf_name), file.get_slice(hf_name))
    missing -= sources.keys()
    if missing == {"output.weight"}:
        raise ConfigError(
            f"config.json of {str(folder)!r} has tie_word_embeddings=false, and its files hold no {HEAD}; set it to "
            "true if the head is the embedding"
        )
    check_complete(model, missing, folder)
    for head in stored_heads:
        check_tied(head, sources["tok_embeddings.weight"].rows, model.embedding.dtype, folder)
    return sources


def load_decoder(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize_base: bool = False,
    implementation: Implementation = "auto",
) -> Decoder:
    """`empty_decoder` and `fill_decoder` in one: a frozen model on `device`, in NF4 if `quantize_base`."""
    model = empty_decoder(
        folder, dtype=dtype, device=device, quantize_base=quantize_base, implementation=implementation
    )
    fill_decoder(model, folder, device=device, quantize_base=quantize_base)
    return model
