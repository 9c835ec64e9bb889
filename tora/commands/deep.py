"""`tora validate --deep`: what a run does before its first step, without a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tora.config.schema import RunConfig
from tora.errors import ConfigError, OverlongPrompt
from tora.types import Prompt


def look(cfg: RunConfig) -> Iterator[str]:
    """Lines about the model's type, the data, the first prompt as the model sees it, and its rewards.

    Raises ConfigError as the start of a run does.
    """
    from pathlib import Path

    from tora.config.components import import_from, locate
    from tora.config.load import missing_folders
    from tora.models.hub import fetched
    from tora.models.load import read_config, shard_files
    from tora.tasks.prompts import RunPrompts

    for clause in missing_folders(cfg):
        raise ConfigError(f"{clause}.")
    import_from(cfg.import_from or ())
    cfg = replace(cfg, model=fetched(cfg.model))
    folder = Path(cfg.model.path)
    config = read_config(folder)
    yield f"model: {config.model_type}, {len(shard_files(folder))} files of weights"
    for component in (cfg.loss, cfg.optimizer, cfg.lr_scheduler, *cfg.metric_logger):
        locate(component["_component_"])
    prompts = RunPrompts(cfg)
    yield f"held-out prompts: {len(prompts.held_out)}"
    prompt = None
    for position in range(1000):
        try:
            prompt = prompts.at(position)
            break
        except OverlongPrompt:
            continue
    if prompt is None:
        raise ConfigError("the first 1000 prompts are all too long; raise max_prompt_tokens.")
    yield f"first prompt, {len(prompt.token_ids)} tokens: {prompts.tokenizer.decode(prompt.token_ids)!r}"
    yield f"its columns: {', '.join(prompt.columns) or 'none'}"
    if cfg.environment_factory is not None or cfg.tools or cfg.agent is not None:
        yield "rewards: not called, since the config has an environment or tools"
        return
    yield from _scores(cfg, prompt)


def _scores(cfg: RunConfig, prompt: Prompt) -> Iterator[str]:
    from tora.rewards.processes import RewardProcesses
    from tora.types import FailedReward

    answer = prompt.columns.get("answer")
    texts = ["", *([str(answer)] if answer is not None else [])]
    rewarder = RewardProcesses(cfg.rewards, timeout_s=cfg.reward_timeout_s, num_processes=1)
    try:
        rows = rewarder(prompt, texts, [[0] for _ in texts])
    finally:
        rewarder.close()
    for text, row in zip(texts, rows, strict=True):
        if isinstance(row, FailedReward):
            raise ConfigError(f"reward {row.name} {row.reason}{row.place}, for the completion {text!r}.")
        parts = ", ".join(f"{name} {score:g}" for name, score in row.items())
        yield f"rewards of the completion {text!r}: {parts}"
