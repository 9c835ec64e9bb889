"""Random sequences, and their logits from a decoder that takes them packed."""

from typing import Any

import torch
import torch._dynamo

from tora.models.attention import PackedAttention

CPU = torch.device("cpu")


def packed_logits(model: Any, sequences: list[torch.Tensor]) -> torch.Tensor:
    lengths = torch.tensor([len(s) for s in sequences])
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    hidden = model(torch.cat(sequences)[None], positions=positions[None], attend=PackedAttention(lengths))
    return model.logits(hidden[0])


def random_sequences(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 259, (n,), generator=generator) for n in lengths]


def attention_inputs(lengths: list[int], device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(lengths), heads, 64) for heads in (4, 2, 2)]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
