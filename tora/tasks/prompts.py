"""The prompts of a run, and how they are answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tora.components import instantiate
from tora.config import RunConfig
from tora.tasks.dataset import PromptStream
from tora.tasks.text import load_tokenizer, stop_token_ids
from tora.types import Prompt, Sampling


class RunPrompts:
    """Tokenizer, prompt stream and evaluation set. Errors: ConfigError for a dataset or model that does not open."""

    def __init__(self, cfg: RunConfig) -> None:
        model = Path(cfg.model.path)
        self.tokenizer = load_tokenizer(model)
        stream = PromptStream(instantiate(cfg.dataset), self.tokenizer, cfg.max_prompt_tokens, cfg.seed)
        self.at: Callable[[int], Prompt] = stream.prompt
        self.held_out: list[Prompt] = []
        if cfg.eval is not None:
            held_out = PromptStream(instantiate(cfg.eval.dataset), self.tokenizer, cfg.max_prompt_tokens, cfg.seed)
            self.held_out = held_out.sequential(cfg.eval.num_prompts)
        stop = stop_token_ids(model, self.tokenizer)
        self.sampling = Sampling(cfg.max_generated_tokens, cfg.temperature, cfg.top_k, cfg.top_p, stop)
        eval_temperature = cfg.eval.temperature if cfg.eval else 0.0
        self.eval_sampling = Sampling(cfg.max_generated_tokens, eval_temperature, stop_token_ids=stop)
