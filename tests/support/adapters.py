"""Adapter layers on tiny models, and their parity with PEFT."""

from pathlib import Path
from typing import Any

import torch
from decoders import packed_logits, random_sequences
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from tora.adapters.inject import (
    adapter_layers,
    inject,
    refresh,
    trained_parameters,
)
from tora.adapters.peft_config import read_peft_config
from tora.adapters.peft_format import load_peft, peft_config, peft_tensors, save_peft
from tora.adapters.targets import adapter_shapes
from tora.config.schema import ModelConfig
from tora.models.load import load_decoder

TYPES = ("lora", "dora", "dora_cache")


RANK, ALPHA = 4, 10.0


def model_config(folder: Path, lora_type: str, **changes: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), lora_type=lora_type, lora_rank=RANK, lora_alpha=ALPHA, **changes)


def build(cfg: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    cpu, path = torch.device("cpu"), Path(cfg.path)
    model = load_decoder(
        path, dtype=dtype, device=cpu, quantize_base=cfg.quantize_base, implementation=cfg.implementation
    )
    start = read_peft_config(Path(cfg.adapter_path)) if cfg.adapter_path else None
    inject(model, cfg.lora_type, adapter_shapes(model, cfg, start))
    if cfg.adapter_path:
        load_peft(model, cfg, Path(cfg.adapter_path))
    return model


@torch.no_grad()
def shake(model: nn.Module, seed: int = 3) -> None:
    """Moves every trained parameter away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in trained_parameters(model).items():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("magnitude"):
            parameter.mul_(1 + 0.2 * noise.abs())
        else:
            parameter.copy_(0.1 * noise)
    refresh(model)


def check_against_peft(cfg: ModelConfig, base_folder: Path, adapter_folder: Path, num_modules: int = 14) -> None:
    """Raises AssertionError unless outputs and gradients equal those of PEFT over the base in `base_folder`.

    `num_modules`: layers with an adapter.
    """
    ours = build(cfg)
    shake(ours)
    save_peft(peft_tensors(ours), peft_config(ours, cfg), adapter_folder)
    # eager: transformers' other kernels leave out soft caps
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, str(adapter_folder), is_trainable=True)
    sequences = random_sequences(9, 21)
    ours_logits = packed_logits(ours, sequences)
    their_logits = torch.cat([theirs(s[None]).logits[0] for s in sequences])
    torch.testing.assert_close(ours_logits, their_logits, atol=1e-4, rtol=1e-5)

    loss_of(ours_logits).backward()
    loss_of(their_logits).backward()
    their_gradients = {
        n.removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters() if p.requires_grad
    }
    names = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}
    names["magnitude"] = "lora_magnitude_vector.default.weight"
    compared = 0
    for module, layer in adapter_layers(ours).items():
        for name in layer.adapter_params():
            expected = their_gradients[f"{module}.{names[name]}"]
            torch.testing.assert_close(getattr(layer, name).grad, expected, atol=1e-6, rtol=1e-3)
            compared += 1
    assert compared == len(their_gradients) == num_modules * (2 if cfg.lora_type == "lora" else 3)


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return (logits * torch.randn(logits.shape, generator=generator)).mean()
