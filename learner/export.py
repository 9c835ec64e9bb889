"""The trained policy as files that other libraries load."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from tora.adapters.inject import adapter_layers
from tora.adapters.peft_format import peft_config, peft_tensors, save_peft
from tora.config.schema import ModelConfig
from tora.distributed.sharding import gather
from tora.models.base import Decoder
from tora.models.load import side_files


def export_policy(model: Decoder, cfg: ModelConfig, folder: Path, dtype: torch.dtype, *, is_writer: bool) -> None:
    """Write the adapter in PEFT's format, or all weights as a Hugging Face folder in `dtype` if the run trains them.

    Collective: every rank gathers the tensors, and the rank with `is_writer` writes them.
    """
    if adapter_layers(model):
        tensors = gather(peft_tensors(model))
        if is_writer:
            with _aside(folder) as aside:
                save_peft(tensors, peft_config(model, cfg), aside)
        return
    weights = gather(dict(model.named_parameters()))  # all of them: a frozen vision tower belongs to the model too
    if not is_writer:
        return
    tensors = {
        model.names.parameter_to_hf(name): p.detach().to(dtype).cpu().contiguous() for name, p in weights.items()
    }
    with _aside(folder) as aside:
        for file in side_files(Path(cfg.path)):
            if "safetensors" not in file.name:  # the index of a base in several files; the export is one file
                shutil.copy(file, aside)
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder whose files replace those of `folder` once all are written; an error leaves `folder` as it was."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that died while writing
    aside.mkdir(parents=True)
    try:
        yield aside
        folder.mkdir(exist_ok=True)
        for file in aside.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
