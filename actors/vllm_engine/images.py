"""Images into vLLM 0.32: engine arguments for a vision model, and requests with images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from tora.models.vision.processor import decode

if TYPE_CHECKING:
    from vllm.inputs import EngineInput
    from vllm.multimodal.inputs import PlaceholderRange
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
        self._mark = self._image_token if self._image_token is None else _mark(llm, self._image_token)
        self._lock = Lock()  # the processor's tokenizer is not thread-safe

    def __call__(self, token_ids: Sequence[int], images: Sequence[bytes]) -> EngineInput:
        """Raises ValueError if vLLM's processor makes another number of features of the images than the prompt has
        placeholders for."""
        from vllm.inputs import tokens_input

        if not images:
            return tokens_input(list(token_ids))
        if self._image_token is None:
            raise ValueError(f"a prompt has {len(images)} images, but the engine's model takes none")
        # vLLM would expand a prompt by its own rules; of its answer only what concerns the images is used
        prompt: Any = {
            "prompt_token_ids": [self._mark] * len(images),
            "multi_modal_data": {"image": [decode(image) for image in images]},
        }
        with self._lock:
            made: Any = self._renderer.render_cmpl([prompt])[0]
        counts = [int(place.get_num_embeds()) for place in made["mm_placeholders"]["image"]]
        made["mm_placeholders"] = {"image": places(token_ids, self._image_token, counts)}
        made["prompt_token_ids"] = list(token_ids)
        return made


def _mark(llm: LLMEngine, image_token: int) -> int:
    """The token that stands for an image before vLLM expands a prompt."""
    config: Any = llm.model_config.hf_config
    return getattr(config, "boi_token_id", None) or image_token


def places(token_ids: Sequence[int], image_token: int, counts: Sequence[int]) -> list[PlaceholderRange]:
    """Where the features of images are among the tokens: of the first image `counts[0]`, and so on. Later placeholders
    were sampled and stand for no image.

    Raises ValueError if there are fewer placeholders, or an image begins within a run of them.
    """
    from vllm.multimodal.inputs import PlaceholderRange

    index = [i for i, token in enumerate(token_ids) if token == image_token]
    if len(index) < sum(counts):
        raise ValueError(
            f"a prompt has {len(index)} image placeholders, and vLLM makes {sum(counts)} features of its images: the "
            "image processors or their pixel limits differ"
        )
    found, start = [], 0
    for count in counts:
        own = index[start : start + count]
        start += count
        begins = token_ids[own[0] - 1] != image_token or own[0] == 0
        ends = own[-1] + 1 == len(token_ids) or token_ids[own[-1] + 1] != image_token
        if not (begins and ends):
            raise ValueError(
                "a run of image placeholders in a prompt is not as long as vLLM's number of features: the image "
                "processors or their pixel limits differ"
            )
        span = torch.tensor(token_ids[own[0] : own[-1] + 1]) == image_token
        found.append(PlaceholderRange(own[0], len(span), None if span.all() else span))
    return found
