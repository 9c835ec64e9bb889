"""In how many parts the learner may take a step; see `step_parts`."""

from __future__ import annotations

from collections.abc import Iterator

from tora.config.components import is_own
from tora.config.schema import RunConfig

_BY_DEFAULT = 4


def step_parts(cfg: RunConfig) -> int:
    """`cfg.step_parts`, or what is best if it is null."""
    if cfg.step_parts is not None:
        return cfg.step_parts
    in_parts = cfg.max_staleness > 0 and is_own(cfg.loss) and not any(lacks(cfg, _BY_DEFAULT))
    return _BY_DEFAULT if in_parts else 1


def lacks(cfg: RunConfig, parts: int) -> Iterator[str]:
    """What the config would have to be for more than one part."""
    for broken, needs in (
        (not cfg.async_rl, "async_rl=true"),
        (cfg.num_mini_batches > 1 or cfg.ppo_epochs > 1, "num_mini_batches=1 and ppo_epochs=1"),
        (cfg.advantage == "reinforce++", "advantage=grpo or rloo; reinforce++ compares the whole batch"),
        (cfg.loss_normalization == "constant", "loss_normalization=token or sequence"),
        (parts > cfg.batch_size, f"batch_size of at least as many, which is {cfg.batch_size}"),
    ):
        if broken:
            yield needs
