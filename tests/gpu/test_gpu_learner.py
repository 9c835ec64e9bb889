"""The learner's faster paths on a GPU, against its plain ones on the same GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comparisons import compare
from decoders import attention_inputs
from learners import train
from tiny import make_text_model

from tora.models.attention import PackedAttention
from tora.models.varlen import VarlenAttention, VarlenFrameAttention
from tora.models.vision.layout import FrameAttention


def test_varlen_attention_equals_packed_attention() -> None:
    lengths = [50, 1, 170, 8]
    found = []
    for kind in (VarlenAttention, PackedAttention):
        inputs = attention_inputs(lengths, "cuda", torch.bfloat16)
        out = kind(torch.tensor(lengths, device="cuda"))(*inputs)
        out.float().square().sum().backward()
        found.append([out, *(x.grad for x in inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_an_images_patches_attend_alike_with_and_without_padding() -> None:
    lengths, generator = torch.tensor([64, 16, 144], device="cuda"), torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(1, 224, 16, 72, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
        for _ in range(3)
    ]
    found = []
    for kind in (VarlenFrameAttention, FrameAttention):
        out = kind(lengths)(*inputs)
        found.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("lora_type", ["full", "dora_cache"])
def test_activation_offloading_changes_no_weight(tmp_path: Path, lora_type: str) -> None:
    folder = make_text_model(tmp_path, "qwen2", num_layers=4)
    plain = train(folder, lora_type, activation_checkpointing="full", device="cuda")
    away = train(folder, lora_type, activation_checkpointing="full", activation_offloading=True, device="cuda")
    compare(plain[1], away[1])
