"""Tensors in one flat buffer: where each lies, and that they do not touch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from actors.vllm_engine.flat_buffer import Span, lay_out, view

WANTED = [
    ("a", torch.bfloat16, (3, 5)),
    ("flag", torch.bool, ()),
    ("empty", torch.float32, (0, 4)),
    ("gain", torch.float32, (7,)),
    ("b", torch.float64, (2, 1)),
]


def test_spans_are_aligned_in_order_and_apart() -> None:
    spans, nbytes = lay_out(WANTED)
    assert spans == {
        "a": Span(0, torch.bfloat16, (3, 5)),
        "flag": Span(32, torch.bool, ()),
        "empty": Span(48, torch.float32, (0, 4)),
        "gain": Span(48, torch.float32, (7,)),
        "b": Span(80, torch.float64, (2, 1)),
    }
    assert nbytes == 96
    assert lay_out([]) == ({}, 0)
    with pytest.raises(AssertionError, match="twice"):
        lay_out([WANTED[0], WANTED[0]])


def test_each_view_holds_its_own_values() -> None:
    spans, nbytes = lay_out(WANTED)
    buffer = torch.zeros(nbytes, dtype=torch.uint8)
    sent = {
        key: (torch.randn(shape) > 0 if dtype == torch.bool else torch.randn(shape).to(dtype))
        for key, dtype, shape in WANTED
    }
    for key, tensor in sent.items():
        view(buffer, spans[key]).copy_(tensor)
    for key, tensor in sent.items():
        assert torch.equal(view(buffer, spans[key]), tensor)
        assert view(buffer, spans[key]).is_contiguous()
