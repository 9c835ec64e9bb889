"""Fields of config.json that vLLM 0.32 computes otherwise with than transformers. Imports neither vLLM nor torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def config_overrides(model_path: str) -> dict[str, Any]:
    """The values that vLLM must be given instead, to compute what transformers does with the folder's own."""
    config = json.loads(Path(model_path, "config.json").read_text())
    if config.get("model_type") == "cohere2" and (window := config.get("sliding_window")):
        return {"sliding_window": window - 1}  # vLLM adds the token itself, transformers counts it
    return {}
