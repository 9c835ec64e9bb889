"""The prompts of a run, and how they are answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tora.components import instantiate
from tora.config import Component, RunConfig
from tora.errors import ConfigError
from tora.models.vision.processor import ImageProcessor, has_image_processor
from tora.tasks.dataset import PromptStream
from tora.tasks.text import load_tokenizer, stop_token_ids
from tora.types import Prompt, Sampling


class RunPrompts:
    """Tokenizer, prompt stream and evaluation set. Errors: ConfigError for a dataset or model that does not open."""

    def __init__(self, cfg: RunConfig) -> None:
        model = Path(cfg.model.path)
        self.tokenizer = load_tokenizer(model)
        images = _image_processor(model, cfg.rollout.max_pixels)
        self.image_token = None if images is None else images.image_token_id

        def stream_of(dataset: Component) -> PromptStream:
            return PromptStream(instantiate(dataset), self.tokenizer, cfg.max_prompt_tokens, cfg.seed, images)

        self.at: Callable[[int], Prompt] = stream_of(cfg.dataset).prompt
        self.held_out: list[Prompt] = []
        if cfg.eval is not None:
            self.held_out = stream_of(cfg.eval.dataset).sequential(cfg.eval.num_prompts)
        stop = stop_token_ids(model, self.tokenizer)
        self.sampling = Sampling(cfg.max_generated_tokens, cfg.temperature, cfg.top_k, cfg.top_p, stop)
        eval_temperature = cfg.eval.temperature if cfg.eval else 0.0
        self.eval_sampling = Sampling(cfg.max_generated_tokens, eval_temperature, stop_token_ids=stop)


def _image_processor(model: Path, max_pixels: int | None) -> ImageProcessor | None:
    """None for a text model. Errors: ConfigError for a limit that nothing would heed."""
    if has_image_processor(model):
        return ImageProcessor(model, max_pixels)
    if max_pixels is not None:
        raise ConfigError(f"rollout.max_pixels={max_pixels} needs a model that takes images, and {model} takes none")
    return None
