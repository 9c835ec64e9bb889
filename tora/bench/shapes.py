"""Folders of random weights in the shapes of known models."""

from __future__ import annotations

from pathlib import Path

from tora.bench.vision import write_processor
from tora.models.released import shape_config, shape_names

__all__ = ["shape_names", "write_random_model"]


def write_random_model(name: str, folder: Path, *, dtype: str, seed: int = 0) -> Path:
    """Write a loadable Hugging Face folder with random weights: no tokenizer, but an image processor for vision models.

    Raises ConfigError if the name is unknown.
    """
    config = shape_config(name)
    import torch
    from safetensors.torch import save_file

    from tora.models.load import build_model

    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(config, "vision_config"):
        write_processor(folder)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = build_model(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU draws 8B weights for minutes
    generator, options = torch.Generator(device).manual_seed(seed), {"device": device, "dtype": getattr(torch, dtype)}
    tensors = {}
    for ours, place in model.named_parameters():
        value = torch.ones(place.shape, **options)
        if place.ndim > 1:
            value.normal_(0, 0.02, generator=generator)
        tensors[model.names.parameter_to_hf(ours)] = value.cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
