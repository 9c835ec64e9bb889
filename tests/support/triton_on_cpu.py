"""Import first: has Triton interpret its kernels on the CPU, and vLLM believe that it has a driver for them."""

from __future__ import annotations

import os
import types

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import triton.backends

import tora  # noqa: F401  (vLLM needs its import fixes)


class _Active:
    @staticmethod
    def is_active() -> bool:
        return True


# vLLM turns Triton off where no driver is active
triton.backends.backends.update({name: types.SimpleNamespace(driver=_Active) for name in ("interpreter", "cpu")})
