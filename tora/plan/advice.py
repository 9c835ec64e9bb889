"""Which settings would make a run fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tora.config.schema import RunConfig

Change = dict[str, str | int | float | bool]
"""Values by the dotted key that they override."""
_MOST = 3
_SHARES = tuple(share / 100 for share in range(20, 95, 5))
_RANKS = (2, 4, 8)


def advice(cfg: RunConfig, fits: Callable[[RunConfig], bool], *, on_gpu: bool) -> list[str]:
    """Up to three ways to make it fit, as overrides: changes of one key first, then of two, then of three."""
    single = list(_single(cfg, on_gpu=on_gpu))
    for changes in (single, list(_combined(cfg, on_gpu=on_gpu))):
        found: list[Change] = []
        for alternatives in changes:
            fitting = next((change for change in alternatives if fits(changed(cfg, change))), None)
            if fitting is not None and not any(earlier.keys() <= fitting.keys() for earlier in found):
                found.append(fitting)
        if found:
            return [" ".join(f"{key}={_show(value)}" for key, value in change.items()) for change in found[:_MOST]]
    return []


def changed(cfg: RunConfig, change: Change) -> RunConfig:
    """The config with these overrides."""
    for key, value in change.items():
        section, _, name = key.rpartition(".")
        cfg = replace(cfg, **{section: replace(getattr(cfg, section), **{name: value})} if section else {name: value})
    return cfg


def _single(cfg: RunConfig, *, on_gpu: bool) -> Iterator[list[Change]]:
    """Changes of one key, each with its values from the mildest."""
    if cfg.activation_checkpointing != "full":
        yield [{"activation_checkpointing": "full"}]
    yield [{"micro_batch_tokens": tokens} for tokens in _smaller_batches(cfg)]
    if on_gpu and cfg.rollout.engine == "vllm":
        yield [{"rollout.gpu_memory_utilization": share} for share in reversed(_SHARES)]
    if cfg.model.lora_type != "full" and not cfg.model.quantize_base:
        yield [{"model.quantize_base": True}]
    if on_gpu:
        yield [{"learner_ranks": ranks} for ranks in _RANKS if ranks > cfg.learner_ranks]


def _combined(cfg: RunConfig, *, on_gpu: bool) -> Iterator[list[Change]]:
    full: Change = {} if cfg.activation_checkpointing == "full" else {"activation_checkpointing": "full"}
    batches = [cfg.micro_batch_tokens, *_smaller_batches(cfg)]
    shares = list(reversed(_SHARES)) if on_gpu and cfg.rollout.engine == "vllm" else [None]

    def with_share(change: Change, share: float | None) -> Change:
        return change if share is None else {**change, "rollout.gpu_memory_utilization": share}

    yield [{**full, "micro_batch_tokens": tokens} for tokens in batches]
    yield [with_share({**full, "micro_batch_tokens": tokens}, share) for tokens in batches for share in shares]
    if cfg.model.lora_type != "full" and not cfg.model.quantize_base:
        yield [
            with_share({**full, "model.quantize_base": True, "micro_batch_tokens": tokens}, share)
            for tokens in batches
            for share in shares
        ]
    if on_gpu:
        yield [
            with_share({**full, "learner_ranks": ranks, "micro_batch_tokens": tokens}, share)
            for ranks in _RANKS
            if ranks > cfg.learner_ranks
            for tokens in batches
            for share in shares
        ]


def _smaller_batches(cfg: RunConfig) -> list[int]:
    longest = cfg.max_prompt_tokens + cfg.max_generated_tokens
    sizes = [cfg.micro_batch_tokens >> halvings for halvings in range(1, 8)]
    return [size for size in sizes if size >= longest]


def _show(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
