"""Checks on a well-typed config: the bounds of its numbers, and rules across keys."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, TypeGuard

from tora.config.bounds import out_of_bounds
from tora.config.components import class_literal
from tora.config.convert import show
from tora.config.hub_names import check_repo
from tora.config.parts import lacks
from tora.config.schema import ALL_LINEAR, RunConfig
from tora.errors import ConfigError, nearest

_NO_ADAPTER = ("lm_head", "embed_tokens")
"""A tied model shares the weights of the two, and rollout engines cannot serve adapters on them."""

_ASKS_ENVIRONMENT = ("tora.environments.get_reward", "tora.environments.base.get_reward")


def check(cfg: RunConfig) -> None:
    """Raises ConfigError if the config breaks a rule, and reports the first."""
    for sentence in _broken(cfg):
        raise ConfigError(sentence)


def _broken(cfg: RunConfig) -> Iterator[str]:
    yield from out_of_bounds(cfg)
    if not cfg.name:
        yield 'name="" must not be empty.'
    yield from _broken_model(cfg)
    yield from _broken_components(cfg)
    yield from _broken_workers(cfg)
    yield from _broken_base(cfg)
    yield from _broken_updates(cfg)
    yield from _broken_learner(cfg)
    yield from _broken_environments(cfg)
    yield from _broken_stop(cfg)
    yield from _broken_hub(cfg)
    longest = cfg.max_prompt_tokens + cfg.max_generated_tokens
    if cfg.rollout.max_model_len is not None and cfg.rollout.max_model_len < longest:
        yield (
            f"rollout.max_model_len={cfg.rollout.max_model_len} must be at least "
            f"max_prompt_tokens + max_generated_tokens, which is {longest}."
        )


def _broken_hub(cfg: RunConfig) -> Iterator[str]:
    if not cfg.push_to_hub and cfg.hub_model_id is not None:
        yield f"hub_model_id={cfg.hub_model_id} needs push_to_hub=true."
    if cfg.push_to_hub:
        key = "name" if cfg.hub_model_id is None else "hub_model_id"
        try:
            check_repo(cfg.hub_model_id or cfg.name, key)
        except ConfigError as error:
            yield str(error)


def _broken_stop(cfg: RunConfig) -> Iterator[str]:
    of_eval = None if cfg.eval is None else cfg.eval.stop
    for key, strings in (("stop", cfg.stop), ("eval.stop", of_eval or [])):
        if "" in strings:
            yield f"{key}={show(strings)} must not hold an empty string."
        if strings and (cfg.environment_factory is not None or cfg.tools):
            yield f"{key}={show(strings)} has no place in rollouts with environment_factory or tools, whose turns end."
    if cfg.stop and cfg.rollout.partial is not None:
        yield (
            f"stop={show(cfg.stop)} needs rollout.partial=null: a string could begin in one part of a rollout and end "
            "in the next."
        )


def lacks_for_eval_workers(cfg: RunConfig) -> Iterator[str]:
    """What the config would have to be for workers that evaluate alone."""
    for broken, needs in (
        (not cfg.async_rl, "async_rl=true"),
        (cfg.eval is None or cfg.eval.blocking, "eval.blocking=false"),
        (cfg.model.trains_whole, "adapters alone to be trained, of which engines can hold two versions"),
    ):
        if broken:
            yield needs


def _broken_workers(cfg: RunConfig) -> Iterator[str]:
    if cfg.rollout.num_workers > 1 and not cfg.async_rl:
        yield f"rollout.num_workers={cfg.rollout.num_workers} needs async_rl=true."
    for key in ("whole_gpus", "marked_nodes", "prompt_process"):
        if getattr(cfg, key) and not cfg.async_rl:
            yield f"{key}=true needs async_rl=true."
    if not cfg.async_rl and cfg.rollout.stragglers != "wait":
        yield f"rollout.stragglers={cfg.rollout.stragglers} needs async_rl=true."
    rounds = 1 + math.ceil(cfg.grpo_samples / cfg.reward_processes)
    rewards_s = rounds * cfg.reward_timeout_s * len(cfg.rewards)
    if cfg.rollout.group_timeout_s <= rewards_s:
        yield (
            f"rollout.group_timeout_s={cfg.rollout.group_timeout_s:g} must be greater than the {rewards_s:g} s that a "
            f"group's rewards may take: {rounds} * reward_timeout_s for each, once for the whole group and once for "
            "each rollout, of which reward_processes are scored at a time."
        )
    if (least := cfg.rollout.min_workers) is not None:
        if not cfg.async_rl:
            yield f"rollout.min_workers={least} needs async_rl=true."
        if least > cfg.rollout.num_workers:
            yield f"rollout.min_workers={least} must be at most rollout.num_workers, {cfg.rollout.num_workers}."
    if cfg.rollout.max_workers is not None:
        if not cfg.async_rl:
            yield f"rollout.max_workers={cfg.rollout.max_workers} needs async_rl=true."
        if cfg.rollout.max_workers < cfg.rollout.num_workers:
            yield (
                f"rollout.max_workers={cfg.rollout.max_workers} must be at least rollout.num_workers, "
                f"which is {cfg.rollout.num_workers}."
            )
    if cfg.eval is not None and cfg.eval.num_workers:
        for needs in lacks_for_eval_workers(cfg):
            yield f"eval.num_workers={cfg.eval.num_workers} needs {needs}."
    if cfg.rollout.sleep is True and (cfg.async_rl or cfg.rollout.engine == "torch"):
        yield "rollout.sleep=true needs async_rl=false and rollout.engine=vllm."
    if cfg.rollout.tensor_parallel > 1 and not (cfg.async_rl and cfg.rollout.engine != "torch"):
        yield f"rollout.tensor_parallel={cfg.rollout.tensor_parallel} needs async_rl=true and rollout.engine=vllm."


def _broken_environments(cfg: RunConfig) -> Iterator[str]:
    for number, path in enumerate(cfg.tools):
        if path in cfg.tools[:number]:
            yield f"tools.{number}={path} is already used by an earlier tool."
    if cfg.environment_factory is None and cfg.agent is None:
        for number, reward in enumerate(cfg.rewards):
            if reward.get("_component_") in _ASKS_ENVIRONMENT:
                yield f"rewards.{number}._component_={reward['_component_']} needs environment_factory."
    if cfg.agent is None and cfg.agent_python is not None:
        yield f"agent_python={cfg.agent_python} has no effect without agent."
    if cfg.agent is not None:
        if cfg.environment_factory is not None or cfg.tools:
            yield "agent has no place beside environment_factory or tools: the program has its own."
        if cfg.eval is not None and cfg.eval.samples > 1:
            yield f"eval.samples={cfg.eval.samples} needs episodes of one conversation, and an agent may have several."
    elif cfg.environment_factory is None and not cfg.tools:
        if cfg.max_tool_calling_iterations is not None:
            yield (
                f"max_tool_calling_iterations={cfg.max_tool_calling_iterations} has no effect without "
                "environment_factory or tools."
            )
        return
    if cfg.learner_ranks > 1 and not cfg.async_rl and cfg.rollout.engine == "torch":
        yield (
            "environment_factory, tools and agent need async_rl=true or rollout.engine=vllm with learner_ranks above "
            "1: ranks that share one model would have to sample the same number of turns."
        )
    answers_s = cfg.environment_timeout_s * ((cfg.max_tool_calling_iterations or 0) + 1)
    if cfg.rollout.group_timeout_s <= answers_s:
        yield (
            f"rollout.group_timeout_s={cfg.rollout.group_timeout_s:g} must be greater than the {answers_s:g} s that an "
            "episode's environment may take: environment_timeout_s for reset and each tool-calling iteration."
        )


def _broken_base(cfg: RunConfig) -> Iterator[str]:
    if cfg.rollout.base == "checkpoint" and not (cfg.model.quantize_base and cfg.rollout.engine == "vllm"):
        yield "rollout.base=checkpoint needs model.quantize_base=true and rollout.engine=vllm."
    if cfg.rollout.base == "checkpoint" and cfg.sync.canary_every and cfg.sync.canary_max_gap is None:
        yield "rollout.base=checkpoint serves a different policy; it needs sync.canary_every=0 or sync.canary_max_gap."
    if cfg.sync.canary_max_gap is not None and not cfg.sync.canary_every:
        yield f"sync.canary_max_gap={cfg.sync.canary_max_gap} has no effect with sync.canary_every=0."


def _broken_learner(cfg: RunConfig) -> Iterator[str]:
    if cfg.activation_offloading and cfg.activation_checkpointing == "none":
        yield "activation_offloading=true needs activation_checkpointing=full or selective."
    if cfg.num_mini_batches > cfg.batch_size:
        yield f"num_mini_batches={cfg.num_mini_batches} must be at most batch_size, which is {cfg.batch_size}."
    if cfg.step_parts is not None and cfg.step_parts > 1:
        for needs in lacks(cfg, cfg.step_parts):
            yield f"step_parts={cfg.step_parts} needs {needs}."
    if cfg.advantage == "rloo" and cfg.normalize_advantages:
        yield "advantage=rloo needs normalize_advantages=false."
    if cfg.credit == "turn":
        if cfg.environment_factory is None:
            yield "credit=turn needs environment_factory, whose method get_turn_reward says what a turn has earned."
        if cfg.advantage == "reinforce++":
            yield "credit=turn needs advantage=grpo or rloo; reinforce++ compares whole rollouts."
        if cfg.loss.get("kl_in") == "reward":
            yield "credit=turn needs loss.kl_in=loss: a penalty on the reward belongs to whole rollouts."
    if cfg.learner_ranks == 1 and cfg.fsdp_cpu_offload:
        yield "fsdp_cpu_offload=true needs learner_ranks of at least 2."


def _broken_updates(cfg: RunConfig) -> Iterator[str]:
    rollout = cfg.rollout
    if rollout.update == "in_flight":
        if not cfg.async_rl or cfg.max_staleness == 0:
            yield "rollout.update=in_flight needs async_rl=true and max_staleness of at least 1."
        if rollout.engine == "torch":
            yield "rollout.update=in_flight needs rollout.engine=vllm."
        if rollout.partial is not None:
            yield (
                f"rollout.partial={rollout.partial} needs rollout.update=between_rollouts: "
                "in_flight does not interrupt rollouts."
            )
    elif rollout.partial is not None and (not cfg.async_rl or cfg.max_staleness == 0):
        yield f"rollout.partial={rollout.partial} needs async_rl=true and max_staleness of at least 1."
    elif rollout.recompute_kv:
        yield "rollout.recompute_kv=true needs rollout.update=in_flight."


def _broken_model(cfg: RunConfig) -> Iterator[str]:
    model = cfg.model
    if model.lora_type == "full":
        if model.adapter_path is not None:
            yield f"model.adapter_path={model.adapter_path} needs an adapter, and model.lora_type=full has none."
        if model.quantize_base:
            yield "model.quantize_base=true freezes the base, but model.lora_type=full trains it."
        if cfg.rollout.engine == "vllm" and cfg.rollout.update == "in_flight":
            yield "rollout.update=in_flight with vLLM needs an adapter, and model.lora_type=full has none."
        if model.train_vision == "lora":
            yield "model.train_vision=lora needs an adapter, and model.lora_type=full has none."
        return
    if model.train_vision == "full" and cfg.rollout.engine == "vllm":
        yield (
            "rollout.engine=vllm serves an adapter or full weights, not both: model.train_vision=full needs "
            "rollout.engine=torch or model.lora_type=full."
        )
    if not model.lora_targets:
        yield f"model.lora_targets={show(model.lora_targets)} must name at least one linear layer."
    if isinstance(model.lora_targets, str):
        yield from _broken_pattern(model.lora_targets)
        return
    for target in model.lora_targets:
        if target in _NO_ADAPTER or target.endswith(tuple(f".{name}" for name in _NO_ADAPTER)):
            yield f"model.lora_targets must not name {target}, which cannot have an adapter."


def _broken_pattern(targets: str) -> Iterator[str]:
    if targets == ALL_LINEAR:
        return
    if targets.isidentifier():
        yield (
            f"model.lora_targets={targets} is text, and so a regular expression that must match a layer's whole name; "
            f"[{targets}] selects the layers whose names end in it."
        )
    try:
        pattern = re.compile(targets)
    except re.error as error:
        yield f"model.lora_targets={targets} is no regular expression: {error}."
        return
    for name in ("lm_head", "model.embed_tokens", "model.language_model.embed_tokens"):
        if pattern.fullmatch(name):
            yield f"model.lora_targets={targets} must not match {name}, which cannot have an adapter."


def _broken_components(cfg: RunConfig) -> Iterator[str]:
    lr = cfg.optimizer.get("lr")
    if not _is_number(lr) or not lr > 0:
        yield f"optimizer.lr={show(lr)} must be a number greater than 0."
    for key, required in class_literal(cfg.loss, "loss", "requires", default={}).items():
        if getattr(cfg, key) != required:
            path = cfg.loss["_component_"]
            yield f"{key}={show(getattr(cfg, key))} must be {show(required)} with loss._component_={path}."
    if not cfg.rewards:
        yield "rewards=[] must name at least one reward."
    weights = [reward.get("weight", 1.0) for reward in cfg.rewards]
    for i, reward in enumerate(cfg.rewards):
        for key in ("weight", "timeout_score"):
            if key in reward and not _is_number(reward[key]):
                yield f"rewards.{i}.{key}={show(reward[key])} must be a finite number."
        if not isinstance(reward.get("accuracy", False), bool):
            yield f"rewards.{i}.accuracy={show(reward['accuracy'])} must be true or false."
    names = [str(reward.get("name") or reward.get("_component_")).rpartition(".")[2] for reward in cfg.rewards]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield f"rewards.{i}.name={name} is already used by an earlier reward."
    by = cfg.rollout.refill_by
    if by is not None and by not in names:
        yield f"rollout.refill_by={by} is not one of the rewards, which are {', '.join(names)}{nearest(by, names)}."
    if cfg.rewards and not any(weights):
        yield "rewards must have at least one weight other than 0."


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
