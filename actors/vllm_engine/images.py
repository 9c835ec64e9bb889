"""Images into vLLM 0.32: engine arguments for a vision model, and requests with images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from tora.models.vision.processor import decode

if TYPE_CHECKING:
    from vllm.inputs import EngineInput
    from vllm.v1.engine.llm_engine import LLMEngine


def image_args(model_path: str, *, max_pixels: int | None, adapt_vision: bool) -> dict[str, Any]:
    """Arguments for vLLM's `EngineArgs`; none for a text model. `adapt_vision`: the tower and its mergers carry
    adapters."""
    if "vision_config" not in _config(model_path):
        return {}
    args: dict[str, Any] = {
        "limit_mm_per_prompt": {"video": 0},
        "enable_tower_connector_lora": adapt_vision,
        # The learner uses the processor's pixels; normalising on the device would round differently.
        "mm_device_do_normalize": False,
        # Off: samples of a prompt share its pixels anyway, and the cache would grow to 4 GiB.
        "mm_processor_cache_gb": 0,
    }
    if max_pixels is not None:
        args["mm_processor_kwargs"] = {"images_kwargs": {"max_pixels": max_pixels}}
    return args


def vision_linears(model_path: str) -> list[str]:
    """vLLM's names of all linear layers in Qwen3-VL's vision tower and mergers.

    Full names, because a bare `proj` would also match the patch embedding's convolution, which vLLM rejects. Raises
    ValueError for a text model.
    """
    vision = _config(model_path).get("vision_config")
    if vision is None:
        raise ValueError(
            f"{model_path} holds a model without a vision tower, so there is nothing for a vision adapter to adapt"
        )
    blocks = [f"visual.blocks.{i}" for i in range(vision["depth"])]
    deep = [f"visual.deepstack_merger_list.{i}" for i in range(len(vision["deepstack_visual_indexes"]))]
    attention = [f"{block}.attn.{leaf}" for block in blocks for leaf in ("qkv", "proj")]
    owners = [*(f"{block}.mlp" for block in blocks), "visual.merger", *deep]
    return attention + [f"{owner}.{leaf}" for owner in owners for leaf in ("linear_fc1", "linear_fc2")]


def _config(model_path: str) -> dict[str, Any]:
    return json.loads(Path(model_path, "config.json").read_text())


class EngineInputs:
    """Turns expanded token ids and encoded images into the input of vLLM's `add_request`. Thread-safe."""

    def __init__(self, llm: LLMEngine) -> None:
        self._renderer = llm.renderer
        self._image_token: int | None = getattr(llm.model_config.hf_config, "image_token_id", None)
        self._lock = Lock()  # the processor's tokenizer is not thread-safe

    def __call__(self, token_ids: Sequence[int], images: Sequence[bytes]) -> EngineInput:
        """Raises ValueError if vLLM's processor expands the images to different token ids."""
        from vllm.inputs import tokens_input

        if not images:
            return tokens_input(list(token_ids))
        if self._image_token is None:
            raise ValueError(f"a prompt has {len(images)} images, but the engine's model takes none")
        short, length = collapsed(token_ids, self._image_token, len(images))
        prompt: Any = {
            "prompt_token_ids": short,
            "multi_modal_data": {"image": [decode(image) for image in images]},
        }
        with self._lock:
            made: Any = self._renderer.render_cmpl([prompt])[0]
        found = list(made["prompt_token_ids"])
        if found != list(token_ids[:length]):
            raise ValueError(
                f"vLLM expands a prompt with {len(images)} images to {len(found)} tokens, but it has {length}: "
                "the image processors or their pixel limits differ"
            )
        made["prompt_token_ids"] = [*found, *token_ids[length:]]
        return made


def collapsed(token_ids: Sequence[int], image_token: int, count: int) -> tuple[list[int], int]:
    """The tokens up to the end of the `count`-th run of placeholders, with each run collapsed to the single placeholder
    that vLLM expands; and the number of tokens before collapsing. Later placeholders were sampled and stand for no
    image.

    Raises ValueError if there are fewer than `count` runs.
    """
    short: list[int] = []
    length, left = 0, count
    for token, run in groupby(token_ids):
        repeats = len(list(run))
        length += repeats
        short += [token] * (1 if token == image_token else repeats)
        left -= token == image_token
        if left == 0:
            return short, length
    raise ValueError(f"a prompt has {count} images but placeholders for {count - left}")
