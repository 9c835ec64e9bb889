"""How long a run's sequences become, and what that decides in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tora.config.schema import RunConfig
from tora.errors import ConfigError
from tora.models.vision.processor import has_image_processor


def longest_sequence(cfg: RunConfig) -> int | None:
    """Tokens that vLLM must have room for; None for the model's own limit.

    That limit is often 131,072 tokens and more, for which vLLM wants a KV cache that no small machine has. A model that
    takes images keeps it nevertheless: vLLM wants room for the largest image.
    """
    if cfg.rollout.max_model_len is not None:
        return cfg.rollout.max_model_len
    from tora.models.load import read_config

    model = Path(cfg.model.path)
    longest = cfg.max_prompt_tokens + cfg.max_generated_tokens
    fits = longest <= read_config(model).get_text_config().max_position_embeddings
    return longest if fits and not has_image_processor(model) else None


@torch.no_grad()
def fix_rotary(hf: Any, longest: int | None, *, vllm: bool = False) -> None:
    """Give a model of transformers one set of rotary frequencies: those for sequences of up to `longest` tokens, or
    for None of its own limit.

    transformers chooses between two sets, or computes new ones, by the longest sequence of a forward pass. Packing,
    prefill and decoding would each choose otherwise, and vLLM chooses once, by its `max_model_len`. `vllm`: whether it
    generates. Raises ConfigError where no choice is right for all lengths.
    """
    limit: int = longest or hf.config.get_text_config().max_position_embeddings
    for module in hf.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            kind = next((k for k in kind.values() if _depends_on_length(k)), None)
            if kind is not None:
                raise ConfigError(
                    f"{type(hf).__name__} cannot be trained: layers of one kind have rope of type {kind!r}, whose "
                    "frequencies depend on the longest sequence of a batch"
                )
        elif isinstance(kind, str) and _depends_on_length(kind):
            if vllm and kind != "longrope":
                raise ConfigError(
                    f"vLLM computes rope of type {kind!r} as for the model's longest sequence, unlike transformers: "
                    f"{type(hf).__name__} needs rollout.engine=torch"
                )
            _fix(module, kind, limit, type(hf).__name__)


def _depends_on_length(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _fix(module: Any, kind: str, longest: int, model: str) -> None:
    if kind == "longrope":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        original = module.config.rope_parameters["original_max_position_embeddings"]
        if longest > original:
            frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, module.inv_freq.device, seq_len=original + 1)
            module.inv_freq.copy_(frequencies)
    elif longest > module.original_max_seq_len:
        raise ConfigError(
            f"{model} has rope of type {kind!r}, whose frequencies change beyond {module.original_max_seq_len} tokens, "
            f"and the run's longest sequence has {longest}: lower max_prompt_tokens or max_generated_tokens, or set "
            "rollout.max_model_len"
        )
    module.rope_type = "default"
