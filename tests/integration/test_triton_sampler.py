"""The sampler of vLLM's runner for GPUs, by Triton's interpreter: see `tests/support/interpreted_sampler.py`."""

from __future__ import annotations

import pytest
from interpreted import printed_by

pytest.importorskip("vllm")
pytest.importorskip("triton")


@pytest.mark.slow
def test_the_policy_is_reported_beside_what_is_drawn() -> None:
    found = printed_by("interpreted_sampler.py")
    assert found.pop("adapters") == [2, 2, 0, 1, 1, 1], "each token has its request's adapter"
    assert len(found) == 9
    for kind, measured in found.items():
        assert measured["error"] < 2e-6, kind
        # a frequency's mean error is 1; the deviation over 192 draws is about a tenth of it
        assert measured["variation"] < 1.6, kind
