"""Builds a run's engines and the arguments of its rollout workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.vllm_engine.config import EngineConfig
from tora.adapters.peft_config import read_peft_config
from tora.config.components import registered, restore
from tora.config.environments import by_name
from tora.config.rules import check
from tora.config.schema import Component, RunConfig
from tora.distributed.device import device_for
from tora.distributed.process_group import World
from tora.environments.chat import ChatTemplate
from tora.environments.turns import Turns
from tora.errors import ConfigError
from tora.models.length import longest_sequence
from tora.models.vision.processor import ImageProcessor
from tora.protocols import Engine, Rewarder
from tora.run.evaluations import evaluates_behind
from tora.tasks.prompts import RunPrompts
from tora.tasks.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch

    from actors.agent_player import AgentPlayer
    from actors.episode import EpisodePlayer
    from actors.vllm_engine.engine import VLLMEngine
    from actors.vllm_engine.weight_updates import WeightUpdate
    from learner.learner import Learner as Rank
    from tora.models.decoder import Decoder


_SHORT = 64
"""Tokens of a completion up to which vLLM is no faster on a CPU than the torch engine, which shares the learner's
weights: between the 32 and the 128 that `python -m tora.bench.engines` measures."""
INSTALL = "pip install -e '.[async_rl]', or '.[async_rl_cpu]' without a GPU"


def with_engine(cfg: RunConfig) -> RunConfig:
    """Resolves `rollout.engine: auto`. Raises ConfigError if a package that the run needs is not installed."""
    if cfg.async_rl and find_spec("ray") is None:
        raise ConfigError(f"async_rl=true needs Ray: {INSTALL}.")
    has_vllm = find_spec("vllm") is not None
    if cfg.rollout.engine == "vllm" and not has_vllm:
        raise ConfigError(f"rollout.engine=vllm needs vLLM: {INSTALL}; or set rollout.engine=torch.")
    # Asked only where it matters: the driver of an asynchronous run may have no GPU of its own.
    asks = cfg.rollout.engine == "auto" and not cfg.async_rl
    on_gpu = asks and device_for(cfg.device, World.from_environment().local_rank).type == "cuda"
    return resolved_engine(cfg, on_gpu=on_gpu, has_vllm=has_vllm)


def resolved_engine(cfg: RunConfig, *, on_gpu: bool, has_vllm: bool | None = None) -> RunConfig:
    """`with_engine` whatever is installed. `on_gpu`: whether this process has one. `has_vllm`: whether vLLM counts as
    installed; None for whether it is. Raises ConfigError if the config has no place for either engine."""
    if cfg.rollout.engine != "auto":
        return cfg
    has_vllm = find_spec("vllm") is not None if has_vllm is None else has_vllm
    model = cfg.model
    # In a synchronous run the torch engine shares the learner's model, so whole weights need not be sent.
    servable = cfg.async_rl if model.lora_type == "full" else model.train_vision != "full"
    is_short = cfg.max_generated_tokens <= _SHORT
    slower = is_short and not (cfg.async_rl or on_gpu or model.quantize_base) and cfg.learner_ranks == 1
    engines = ["torch"] if not (has_vllm and servable) else ["torch", "vllm"] if slower else ["vllm", "torch"]
    refusals: list[ConfigError] = []
    for engine in engines:
        resolved = replace(cfg, rollout=replace(cfg.rollout, engine=engine))
        try:
            check(resolved)
        except ConfigError as refusal:  # the config needs the other engine, or neither can run it
            refusals.append(refusal)
        else:
            return resolved
    raise refusals[0]


def worker_arguments(cfg: RunConfig, prompts: RunPrompts) -> dict[str, Any]:
    """Keyword arguments of `RolloutWorker`, except `make_engine`."""
    from tora.rewards.processes import RewardProcesses

    objects, in_turns = registered(cfg.rewards), registered(of_turns(cfg))
    make_rewarder = (
        partial(_rewarder_of_objects, cfg.rewards, objects)
        if objects
        else partial(
            RewardProcesses,
            cfg.rewards,
            timeout_s=cfg.reward_timeout_s,
            num_processes=cfg.reward_processes,
            collects_prints=cfg.async_rl,
        )
    )
    turns = prompts.turns
    return {
        "make_rewarder": make_rewarder,
        "tokenizer": prompts.tokenizer,
        "sampling": prompts.sampling,
        "eval_sampling": prompts.eval_sampling,
        "group_size": cfg.grpo_samples,
        "eval_samples": cfg.eval.samples if cfg.eval else 1,
        "seed": cfg.seed,
        "num_steps": cfg.num_steps,
        "eval_seed": None if cfg.eval is None else cfg.eval.seed,
        "part_tokens": cfg.rollout.partial,
        "make_player": None if turns is None else partial(_make_player, cfg, turns, prompts.tokenizer, in_turns),
    }


def _rewarder_of_objects(components: list[Component], objects: Mapping[str, Callable[..., Any]]) -> Rewarder:
    """Functions of a program that no other process can import, called in the process of the rollout worker: Ray sends
    them along. Without time limits."""
    from tora.rewards.rewarder import build_rewarder

    restore(objects)
    return build_rewarder(components)


def of_turns(cfg: RunConfig) -> list[Component]:
    """What the processes of environments call."""
    return [
        *cfg.rewards,
        *by_name(cfg.environment_factory).values(),
        *({"_component_": path} for path in (*cfg.tools, cfg.agent) if path is not None),
    ]


def _make_player(
    cfg: RunConfig, turns: Turns | ChatTemplate, tokenizer: Any, objects: Mapping[str, Callable[..., Any]]
) -> EpisodePlayer | AgentPlayer:
    from actors.episode import EpisodePlayer
    from tora.environments.processes import EnvironmentProcesses
    from tora.environments.tools import make_parser

    program: Component = {
        "_component_": "tora.environments.program.Program",
        "program": cfg.agent,
        "python": cfg.agent_python,
    }
    environments = EnvironmentProcesses(
        cfg.environment_factory if cfg.agent is None else program,
        cfg.tools,
        cfg.rewards,
        timeout_s=cfg.environment_timeout_s,
        reward_timeout_s=cfg.reward_timeout_s,
        num_processes=cfg.environment_processes,
        memory_gib=cfg.environment_memory_gib,
        objects=objects,
    )
    if isinstance(turns, ChatTemplate):
        from actors.agent_player import AgentPlayer
        from actors.endpoint import own_address

        return AgentPlayer(
            environments,
            turns,
            partial(make_parser, cfg.tool_parser, tokenizer),
            max_context=cfg.max_prompt_tokens + cfg.max_generated_tokens,
            gathers=cfg.rollout.engine == "torch",
            host="127.0.0.1" if cfg.agent_address == "loopback" else own_address(),
        )
    parser_of = partial(make_parser, cfg.tool_parser, tokenizer)
    iterations = cfg.max_tool_calling_iterations
    return EpisodePlayer(
        environments,
        turns,
        parser_of,
        tokenizer,
        max_tool_calling_iterations=iterations,
        together=cfg.rollout.engine == "torch",
    )


GPU_MEMORY = 0.9
"""Default share of an engine's part of a GPU that vLLM takes. The rest is for CUDA's context and what vLLM does not
count."""
MIN_SEQS = 128
"""vLLM's own default, for evaluations of a run with few rollouts in flight."""
ROLLOUT_BASE = "rollout_base"
"""A folder in `output_dir` that lasts as long as the run, on every machine that has its own `output_dir`."""


def _rollout_base(cfg: RunConfig, resources: ExitStack) -> str:
    """The folder from which vLLM loads the base: the learner's own weights unless the config says otherwise.

    Closing `resources` may delete it.
    """
    if not cfg.model.quantize_base or cfg.rollout.base == "checkpoint":
        return cfg.model.path
    from learner.policy import DTYPES
    from tora.models.dequantized import dequantized_folder, in_use

    cache, device = Path(cfg.output_dir) / ROLLOUT_BASE, device_for(cfg.device, World.from_environment().local_rank)
    resources.enter_context(in_use(cache))
    folder = dequantized_folder(
        Path(cfg.model.path),
        cache,
        dtype=DTYPES[cfg.dtype],
        device=device,
        implementation=cfg.model.implementation,
    )
    return str(folder)


def sleeps(cfg: RunConfig, *, on_gpu: bool) -> bool:
    """Whether the engine gives its key-value cache back while the learner steps. `rollout.engine` must be resolved."""
    return on_gpu and not cfg.async_rl and cfg.rollout.engine == "vllm" and cfg.rollout.sleep is not False


def shares_base(cfg: RunConfig, *, on_gpu: bool) -> bool:
    """Whether learner and engine hold one copy of the frozen weights. `rollout.engine` must be resolved."""
    model, rollout = cfg.model, cfg.rollout
    is_frozen = model.lora_type != "full" and model.train_vision != "full" and not model.quantize_base
    is_alike = (rollout.dtype or cfg.dtype) == cfg.dtype
    together = on_gpu and not cfg.async_rl and rollout.engine == "vllm" and cfg.learner_ranks == 1
    return rollout.share_base and together and is_frozen and is_alike and not cfg.fsdp_cpu_offload


def make_vllm_engine(
    cfg: RunConfig, gpu_share: float = 1.0, max_rank: int | None = None, *, on_gpu: bool = False
) -> VLLMEngine:
    """`gpu_share`: the share of a GPU that the engine has to itself, 0 to 1. `max_rank`: see `largest_rank`; None for
    `model.lora_rank`. `on_gpu`: for `sleeps`."""
    from actors.vllm_engine.engine import VLLMEngine

    resources = ExitStack()
    config = engine_config(cfg, _rollout_base(cfg, resources), gpu_share, max_rank)
    config = replace(config, sleeps=sleeps(cfg, on_gpu=on_gpu))
    return VLLMEngine(config, update=_weight_update(cfg), resources=resources)


def engine_config(cfg: RunConfig, model_path: str, gpu_share: float, max_rank: int | None = None) -> EngineConfig:
    """`model_path`: the folder that vLLM loads. `gpu_share`, `max_rank`: see `make_vllm_engine`."""
    from tora.adapters.targets import target_leaves

    return EngineConfig(
        model_path=model_path,
        dtype=cfg.rollout.dtype or cfg.dtype,
        lm_head_fp32=cfg.lm_head_fp32,
        max_model_len=longest_sequence(cfg),
        max_num_seqs=max(max_rows(cfg), MIN_SEQS),
        lora_rank=max_rank or cfg.model.lora_rank,
        lora_targets=target_leaves(cfg.model),
        gains=cfg.model.lora_type != "lora",
        pins=evaluates_behind(cfg),
        adapt_vision=cfg.model.train_vision == "lora",
        max_pixels=cfg.rollout.max_pixels,
        seed=cfg.seed,
        gpu_memory_utilization=cfg.rollout.gpu_memory_utilization or GPU_MEMORY * gpu_share,
        kv_cache_gib=cfg.rollout.kv_cache_gib,
        enforce_eager=cfg.rollout.enforce_eager,
        gpu=World.from_environment().local_rank,  # under torchrun; a Ray actor sees only its own
        tensor_parallel=cfg.rollout.tensor_parallel,
    )


def with_packing(cfg: RunConfig, *, on_gpu: bool) -> RunConfig:
    """`share_prefix: null` stays where batches decide it; it becomes false on a GPU and for compiled layers, of which
    each way of packing would need its own."""
    fixed = cfg.share_prefix is None and (on_gpu or cfg.compile)
    return replace(cfg, share_prefix=False) if fixed else cfg


def largest_rank(cfg: RunConfig) -> int:
    """The largest rank of any adapter in the run.

    Reads the folder that the run starts from, which not every worker's machine has. Raises ConfigError as
    `read_peft_config` does.
    """
    start = cfg.model.adapter_path
    return max(cfg.model.lora_rank, read_peft_config(Path(start)).max_rank if start else 0)


def _weight_update(cfg: RunConfig) -> WeightUpdate:
    from actors.vllm_engine.weight_updates import BetweenRollouts, InFlight, WholeWeights

    if cfg.model.lora_type == "full":
        return WholeWeights()
    if cfg.rollout.update == "in_flight":
        return InFlight(recompute_kv=cfg.rollout.recompute_kv)
    return BetweenRollouts(cfg.max_staleness + 1 if cfg.async_rl else 1)


def make_torch_engine(cfg: RunConfig) -> Engine:
    """A torch engine with its own copy of the learner's model."""
    from learner.compile import compile_layers
    from learner.policy import build_policy

    device = device_for(cfg.device)
    model = build_policy(cfg, device)
    if cfg.compile:
        compile_layers(model)
    return torch_engine_of(cfg, model, device, shared=False)


def torch_engine_of(cfg: RunConfig, model: Decoder, device: torch.device, *, shared: bool) -> Engine:
    """A torch engine that generates with `model`, which is on `device`. `shared`: snapshots bring no tensors."""
    from actors.torch_engine.engine import TorchEngine

    return TorchEngine(
        model,
        device=device,
        shared=shared,
        max_rows=max_rows(cfg),
        cuda_graphs=_cuda_graphs(cfg, device),
        pins=evaluates_behind(cfg) and not shared,
        processor=_image_processor(cfg),
        tokenizer=partial(load_tokenizer, Path(cfg.model.path)),
    )


def shared_torch_engine(cfg: RunConfig, learner: Rank) -> Engine:
    """A torch engine that generates with the learner's own model."""
    from actors.torch_engine.engine import TorchEngine
    from learner.fsdp import unsharded

    return TorchEngine(
        learner.model,
        device=learner.device,
        shared=True,
        max_rows=max_rows(cfg),
        while_generating=partial(unsharded, learner.model, reshard_after_forward=cfg.fsdp_reshard_after_forward),
        cuda_graphs=_cuda_graphs(cfg, learner.device) and learner.world.size == 1,
        processor=_image_processor(cfg),
        tokenizer=partial(load_tokenizer, Path(cfg.model.path)),
    )


def _image_processor(cfg: RunConfig) -> Callable[[], ImageProcessor]:
    return partial(ImageProcessor, Path(cfg.model.path), cfg.rollout.max_pixels)


def _cuda_graphs(cfg: RunConfig, device: Any) -> bool:
    return device.type == "cuda" and not cfg.rollout.enforce_eager


def max_rows(cfg: RunConfig) -> int:
    """Rollouts that an engine decodes at once."""
    return cfg.rollout.concurrency * cfg.grpo_samples
