"""Merge a policy's adapters into its base, as a Hugging Face folder that every library loads.

A merged weight is gain ⊙ (W + B A), in float32, cast once to the dtype of the base's file. With an NF4 base, W is what
the policy was trained on: the weight after a round trip through NF4.

Shape letters: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tora.adapters.snapshot import GAIN, LORA_A, LORA_B
from tora.errors import ConfigError
from tora.models.load import empty_decoder, shard_files, side_files, stream_tensors
from tora.models.quantize import dequantize, quantize

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What merging changed."""

    num_modules: int
    update: float
    """Frobenius norm of the change of all merged weights, before rounding."""
    rounding: float
    """Frobenius norm of the error that rounding to the file's dtype adds to them."""

    @property
    def rounding_share(self) -> float:
        """Rounding relative to the update; 0 for an adapter without effect."""
        return self.rounding / self.update if self.update else 0.0


def merged_weight(weight_OI: torch.Tensor, adapter: Tensors) -> torch.Tensor:
    """[O, I] float32. `adapter`: one module of `snapshot.split_by_module`, whose B has the scaling folded in."""
    merged_OI = weight_OI.float() + adapter[LORA_B].float() @ adapter[LORA_A].float()
    return adapter[GAIN].float()[:, None] * merged_OI if GAIN in adapter else merged_OI


def merge(
    base: Path,
    out: Path,
    *,
    adapters: Mapping[str, Tensors],
    weights: Tensors,
    quantized_in: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> MergeReport:
    """Write the base in folder `base` with its adapters merged to the new folder `out`, one file in memory at a time.

    `adapters`: by Hugging Face module name, as `snapshot.split_by_module` returns them. `weights`: whole weights that
    were trained, by Hugging Face name. `quantized_in`: the dtype from which the base was quantised to NF4; None if it
    was not. `dtype`: of all floating-point tensors written; None for those of the base's files.
    Raises ConfigError if an adapter belongs to no tensor of the base.
    """
    model = empty_decoder(base, dtype=torch.float32, device=torch.device("cpu"))
    names, quantizable = model.names, model.quantizable()
    left, modules, update, rounding = set(adapters) | set(weights), 0, 0.0, 0.0
    out.mkdir(parents=True)
    for file in side_files(base):
        shutil.copy(file, out)
    for file in shard_files(base):
        tensors: dict[str, torch.Tensor] = {}
        for stored, tensor in stream_tensors(file):
            own = names.parameter_from_hf(stored)
            name = stored if own is None else names.parameter_to_hf(own)
            target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            module = name.removesuffix(".weight")
            if name in weights:
                exact = weights[name].float()
                left.discard(name)
            elif quantized_in is not None and own in quantizable:
                exact = dequantize(quantize(tensor.to(quantized_in), name)).float()
            else:
                exact = tensor
            if name.endswith(".weight") and module in adapters:
                before, exact = exact.float(), merged_weight(exact, adapters[module])
                rounded = exact.to(target)
                update += (exact - before).double().square().sum().item()
                rounding += (rounded.float() - exact).double().square().sum().item()
                modules += 1
                left.discard(module)
            tensors[stored] = exact.to(target).contiguous()
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    if left:
        raise ConfigError(f"{len(left)} adapted layers, such as {min(left)}, belong to no tensor of {base}")
    if dtype is not None:
        _set_dtype(out / "config.json", dtype)
    return MergeReport(modules, math.sqrt(update), math.sqrt(rounding))


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    tree = json.loads(config.read_text())
    name = str(dtype).removeprefix("torch.")
    for part in (tree, tree.get("text_config", {}), tree.get("vision_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in part or (part is tree and key == "dtype"):
                part[key] = name
    config.write_text(json.dumps(tree, indent=2) + "\n")
