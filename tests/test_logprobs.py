"""Log-probs without the logits of all positions, against a whole log-softmax."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from learner.logprobs import token_logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_logprobs_equal_log_softmax_with_gradients(monkeypatch, temperature) -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 50, bias=False), torch.randn(23, 16, requires_grad=True)
    targets = torch.randint(0, 50, (23,))
    distribution = torch.log_softmax(head(hidden).double() / temperature, 1)
    expected = distribution.gather(1, targets[:, None])[:, 0]
    upstream = torch.randn(23)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), [hidden, head.weight])
    for rows in (23, 5):
        monkeypatch.setattr("learner.logprobs._CHUNK_BYTES", rows * 50 * 4)
        logprobs, entropy = token_logprobs(hidden, head.weight, targets, temperature=temperature)
        torch.testing.assert_close(logprobs.double(), expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(entropy.double(), -(distribution.exp() * distribution).sum(1), atol=1e-5, rtol=1e-5)
        gradients = torch.autograd.grad((logprobs * upstream).sum(), [hidden, head.weight])
        for ours, reference in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, reference, atol=1e-5, rtol=1e-5)
