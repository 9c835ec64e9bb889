"""vLLM against the learner for families that run transformers' code: adapters on its modules, gains, and the base."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")
