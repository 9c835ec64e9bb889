"""What a well-typed config must also satisfy: ranges, and rules between keys."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any, TypeGuard

from tora.config.convert import show
from tora.config.schema import RunConfig
from tora.errors import ConfigError

_WORDS = {operator.ge: "at least", operator.gt: "greater than", operator.le: "at most"}
_BOUNDS = (
    (
        operator.ge,
        1,
        "num_steps batch_size max_prompt_tokens max_generated_tokens ppo_epochs micro_batch_tokens learner_ranks "
        "model.lora_rank rollout.num_workers rollout.tensor_parallel rollout.max_workers rollout.concurrency "
        "rollout.max_model_len rollout.max_pixels rollout.partial reward_processes "
        "eval.num_prompts eval.every checkpoint.every checkpoint.keep",
    ),
    (operator.ge, 2, "grpo_samples"),
    (
        operator.ge,
        0,
        "seed num_threads max_staleness top_k min_p eval.top_k eval.min_p eval.temperature rollout.max_refills "
        "sync.canary_every rollout.max_restarts max_learner_restarts max_failed_rewards",
    ),
    (
        operator.gt,
        0,
        "temperature top_p repetition_penalty eval.top_p eval.repetition_penalty "
        "clip_grad_norm model.lora_alpha rollout.kv_cache_gib rollout.gpu_memory_utilization "
        "sync.canary_max_gap rollout.group_timeout_s rollout.heartbeat_s rollout.start_timeout_s "
        "reward_timeout_s",
    ),
    (operator.le, 1, "top_p min_p eval.top_p eval.min_p rollout.gpu_memory_utilization max_failed_rewards"),
)
_LOSS_NEEDS = {
    "DrGRPOLoss": {"loss_normalization": "constant", "normalize_advantages": False},
    "DAPOLoss": {"loss_normalization": "token"},
    "GSPOLoss": {"loss_normalization": "sequence"},
    "CISPOLoss": {"loss_normalization": "token"},
}
"""What the papers' objectives consist of beside what our losses compute; `configs/base/` has a file for each."""
_NO_ADAPTER = ("lm_head", "embed_tokens")
"""Shared with the embedding in a tied model, and outside what the rollout engine adapts."""


def check(cfg: RunConfig) -> None:
    """Raises `ConfigError` with the first rule that the config breaks."""
    for sentence in _broken(cfg):
        raise ConfigError(sentence)


def _broken(cfg: RunConfig) -> Iterator[str]:
    for holds, bound, keys in _BOUNDS:
        for key in keys.split():
            value = _get(cfg, key)
            if value is not None and not holds(value, bound):
                yield f"{key}={value} must be {_WORDS[holds]} {bound}."
    if not cfg.name:
        yield 'name="" must not be empty.'
    yield from _broken_model(cfg)
    yield from _broken_components(cfg)
    if cfg.rollout.num_workers > 1 and not cfg.async_rl:
        yield f"rollout.num_workers={cfg.rollout.num_workers} needs async_rl=true."
    rewards_s = 2 * cfg.reward_timeout_s * len(cfg.rewards)
    if cfg.rollout.group_timeout_s <= rewards_s:
        yield (
            f"rollout.group_timeout_s={cfg.rollout.group_timeout_s:g} must be greater than the {rewards_s:g} s that a "
            "group's rewards may take: 2 * reward_timeout_s for each."
        )
    if cfg.rollout.max_workers is not None:
        if not cfg.async_rl:
            yield f"rollout.max_workers={cfg.rollout.max_workers} needs async_rl=true."
        if cfg.rollout.max_workers < cfg.rollout.num_workers:
            yield (
                f"rollout.max_workers={cfg.rollout.max_workers} must be at least rollout.num_workers, "
                f"which is {cfg.rollout.num_workers}."
            )
    if cfg.rollout.tensor_parallel > 1 and not (cfg.async_rl and cfg.rollout.engine != "torch"):
        yield f"rollout.tensor_parallel={cfg.rollout.tensor_parallel} needs async_rl=true and rollout.engine=vllm."
    if cfg.rollout.base == "checkpoint" and not (cfg.model.quantize_base and cfg.rollout.engine == "vllm"):
        yield "rollout.base=checkpoint needs model.quantize_base=true and rollout.engine=vllm."
    if cfg.rollout.base == "checkpoint" and cfg.sync.canary_every and cfg.sync.canary_max_gap is None:
        yield "rollout.base=checkpoint serves another policy; it needs sync.canary_every=0, or sync.canary_max_gap."
    if cfg.sync.canary_max_gap is not None and not cfg.sync.canary_every:
        yield f"sync.canary_max_gap={cfg.sync.canary_max_gap} bounds what sync.canary_every=0 never measures."
    yield from _broken_updates(cfg)
    if cfg.activation_offloading and cfg.activation_checkpointing == "none":
        yield "activation_offloading=true needs activation_checkpointing=full or selective, whose inputs it moves."
    if cfg.learner_ranks == 1 and cfg.fsdp_cpu_offload:
        yield "fsdp_cpu_offload=true needs learner_ranks of at least 2."
    longest = cfg.max_prompt_tokens + cfg.max_generated_tokens
    if cfg.rollout.max_model_len is not None and cfg.rollout.max_model_len < longest:
        yield (
            f"rollout.max_model_len={cfg.rollout.max_model_len} must be at least "
            f"max_prompt_tokens + max_generated_tokens, which is {longest}."
        )


def _broken_updates(cfg: RunConfig) -> Iterator[str]:
    rollout = cfg.rollout
    if rollout.update == "in_flight":
        if not cfg.async_rl or cfg.max_staleness == 0:
            yield "rollout.update=in_flight needs async_rl=true and max_staleness of at least 1."
        if rollout.engine == "torch":
            yield "rollout.update=in_flight needs rollout.engine=vllm."
        if rollout.partial is not None:
            yield f"rollout.partial={rollout.partial} needs rollout.update=between_rollouts: in_flight cuts nothing."
    elif rollout.partial is not None and (not cfg.async_rl or cfg.max_staleness == 0):
        yield f"rollout.partial={rollout.partial} needs async_rl=true and max_staleness of at least 1."
    elif rollout.recompute_kv:
        yield "rollout.recompute_kv=true needs rollout.update=in_flight."


def _broken_model(cfg: RunConfig) -> Iterator[str]:
    model = cfg.model
    if model.lora_type == "full":
        if model.adapter_path is not None:
            yield f"model.adapter_path={model.adapter_path} needs an adapter, and model.lora_type is full."
        if model.quantize_base:
            yield "model.quantize_base=true freezes the base, and model.lora_type=full trains it."
        if cfg.rollout.engine == "vllm" and cfg.rollout.update == "in_flight":
            yield "rollout.update=in_flight needs an adapter with rollout.engine=vllm, and model.lora_type is full."
        if model.train_vision == "lora":
            yield "model.train_vision=lora needs an adapter, and model.lora_type is full."
        return
    if model.train_vision == "full" and cfg.rollout.engine == "vllm":
        yield (
            "rollout.engine=vllm serves an adapter or whole weights, not both: model.train_vision=full needs "
            "rollout.engine=torch, or model.lora_type=full."
        )
    if not model.lora_targets:
        yield "model.lora_targets=[] must name at least one linear layer."
    for target in model.lora_targets:
        if target in _NO_ADAPTER or target.endswith(tuple(f".{name}" for name in _NO_ADAPTER)):
            yield f"model.lora_targets must not name {target}, which cannot carry an adapter."


def _broken_components(cfg: RunConfig) -> Iterator[str]:
    lr = cfg.optimizer.get("lr")
    if not _is_number(lr) or not lr > 0:
        yield f"optimizer.lr={show(lr)} must be a number greater than 0."
    path = str(cfg.loss.get("_component_"))
    needs = _LOSS_NEEDS.get(path.rpartition(".")[2], {}) if path.startswith("learner.loss.") else {}
    for key, needed in needs.items():
        if getattr(cfg, key) != needed:
            yield f"{key}={show(getattr(cfg, key))} must be {show(needed)} with loss._component_={path}."
    if not cfg.rewards:
        yield "rewards=[] must name at least one reward."
    weights = [reward.get("weight", 1.0) for reward in cfg.rewards]
    for i, weight in enumerate(weights):
        if not _is_number(weight):
            yield f"rewards.{i}.weight={show(weight)} must be a finite number."
    names = [str(reward.get("name") or reward.get("_component_")).rpartition(".")[2] for reward in cfg.rewards]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield f"rewards.{i}.name={name} is taken by an earlier reward."
    if cfg.rewards and not any(weights):
        yield "rewards must have at least one weight other than 0."


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _get(cfg: RunConfig, key: str) -> float | None:
    """The value at a dotted key; None inside an `eval` that is switched off."""
    if key.startswith("eval.") and cfg.eval is None:
        return None
    return operator.attrgetter(key)(cfg)
