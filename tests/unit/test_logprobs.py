"""Chunked log-probs against a full log-softmax in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoders import random_sequences
from tiny import make_text_model

from learner.logprobs import token_logprobs
from tora.models.attention import PackedAttention
from tora.models.load import load_decoder

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("rows", [23, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_chunks_equal_log_softmax_with_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, temperature: float, rows: int
) -> None:
    torch.manual_seed(0)
    head = torch.randn(50, 16).mul(0.25).to(dtype).requires_grad_()
    hidden = torch.randn(23, 16).to(dtype).requires_grad_()
    targets, upstream = torch.randint(0, 50, (23,)), torch.randn(23)
    distribution = (hidden.double() @ head.double().T / temperature).log_softmax(1)
    expected = distribution.gather(1, targets[:, None])[:, 0]
    monkeypatch.setattr("learner.logprobs.CHUNK_BYTES", rows * 50 * 4)
    logprobs, entropy = token_logprobs(hidden, head, targets, temperature=temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(logprobs.double(), expected, atol=tolerance, rtol=tolerance)
    exact_entropy = -(distribution.exp() * distribution).sum(1)
    torch.testing.assert_close(entropy.double(), exact_entropy, atol=tolerance, rtol=tolerance)
    for both in (False, True):
        ours, theirs = (
            lp * upstream + (h * upstream.flip(0) if both else 0)
            for lp, h in ((logprobs, entropy), (expected, exact_entropy))
        )
        _assert_same_gradients(ours, theirs, [hidden, head], tolerance)
    _assert_same_gradients(entropy * upstream, exact_entropy * upstream, [hidden, head], tolerance)


def _assert_same_gradients(
    ours_N: torch.Tensor, theirs_N: torch.Tensor, leaves: list[torch.Tensor], tolerance: float
) -> None:
    ours, theirs = (torch.autograd.grad(x_N.sum(), leaves, retain_graph=True) for x_N in (ours_N, theirs_N))
    for leaf, found, expected in zip(leaves, ours, theirs, strict=True):
        assert found.dtype == leaf.dtype
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_float32_logits_are_not_rounded(temperature: float, num_tokens: int) -> None:
    torch.manual_seed(0)
    head = torch.randn(3000, 576).mul(0.2).bfloat16()
    hidden = torch.randn(num_tokens, 576).mul(2).bfloat16().requires_grad_()
    targets = torch.randint(0, 3000, (num_tokens,))
    exact = (hidden.double() @ head.double().T / temperature).log_softmax(1).gather(1, targets[:, None])[:, 0]
    (exact_gradient,) = torch.autograd.grad(exact.sum(), [hidden])

    def errors(fp32: bool) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, _ = token_logprobs(hidden, head, targets, temperature=temperature, fp32=fp32)
        (gradient,) = torch.autograd.grad(logprobs.sum(), [hidden])
        distance = (gradient.double() - exact_gradient.double()).norm()
        return (logprobs.double() - exact).abs().mean(), distance / exact_gradient.double().norm()

    (rounded, rounded_gradient), (kept, kept_gradient) = errors(False), errors(True)
    assert rounded > 0.01 / temperature and kept < 0.01 * rounded
    assert kept_gradient < min(rounded_gradient, 2**-7)


def test_no_gradient_for_a_frozen_head_and_no_graph_under_no_grad() -> None:
    head, hidden, targets = torch.randn(50, 16), torch.randn(4, 16, requires_grad=True), torch.arange(4)
    logprobs, _ = token_logprobs(hidden, head, targets, temperature=1.0)
    logprobs.sum().backward()
    assert head.grad is None and hidden.grad is not None
    with torch.no_grad():
        assert not token_logprobs(hidden, head, targets, temperature=1.0)[0].requires_grad


def test_full_logits_are_never_saved_for_backward() -> None:
    """Autograd keeps the inputs and two numbers per token between forward and backward."""
    head, hidden, targets = torch.randn(5000, 8), torch.randn(64, 8, requires_grad=True), torch.arange(64)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        token_logprobs(hidden, head, targets, temperature=1.0)
    assert sorted(t.numel() for t in kept) == sorted([head.numel(), hidden.numel(), 64, 64, 64])


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_head_gets_the_same_gradients_as_through_its_module(tmp_path: Path, tied: bool) -> None:
    model = load_decoder(make_text_model(tmp_path, tied=tied), dtype=torch.float32, device=torch.device("cpu"))
    model.requires_grad_(True)
    (ids,) = random_sequences(40)
    targets = ids.roll(1)

    def gradients(way: str) -> dict[str, torch.Tensor]:
        def finish(hidden_1TH: torch.Tensor) -> torch.Tensor:
            if way == "module":
                return model.output(hidden_1TH[0]).log_softmax(1).gather(1, targets[:, None])[:, 0]
            return token_logprobs(hidden_1TH[0], model.head, targets, temperature=1.0)[0]

        model.zero_grad()
        attend = PackedAttention(torch.tensor([len(ids)]))
        model(ids[None], positions=torch.arange(len(ids))[None], attend=attend, output_fn=finish).mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    ours, reference = gradients("ours"), gradients("module")
    assert ours.keys() == reference.keys() == dict(model.named_parameters()).keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, reference[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
