"""vLLM 0.32's engine arguments for an `EngineConfig`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from actors.vllm_engine.config import HAS_GAINS, EngineConfig
from actors.vllm_engine.images import image_args, vision_linears
from actors.vllm_engine.process import hush
from actors.vllm_engine.served_config import config_overrides

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

    from actors.vllm_engine.weight_updates import WeightUpdate


_BATCHED_TOKENS = 8192
"""Tokens that a step on a GPU computes at most, over all sequences."""


def engine_rank(rank: int) -> int:
    """The smallest rank vLLM supports that is at least `rank`. Raises ValueError if there is none."""
    from vllm.config.lora import MaxLoRARanks

    allowed = get_args(MaxLoRARanks)
    if not 0 < rank <= allowed[-1]:
        raise ValueError(f"lora_rank {rank} is outside the range that vLLM can serve, 1 to {allowed[-1]}")
    return next(r for r in allowed if r >= rank)


def class_of_transformers(model_path: str) -> str | None:
    """The architecture of a model that vLLM 0.32 serves with transformers' own class; None if it has a class itself."""
    hush()
    from vllm.model_executor.models.registry import ModelRegistry

    (name, *_) = json.loads(Path(model_path, "config.json").read_text()).get("architectures") or [None]
    if name is None:
        return None
    served = getattr(ModelRegistry.models.get(name), "module_name", "transformers")
    return name if served.endswith("transformers") else None


def engine_args(config: EngineConfig, update: WeightUpdate) -> EngineArgs:
    """The arguments. Raises ValueError if one is impossible."""
    if not Path(config.model_path, "config.json").is_file():
        raise ValueError(f"{config.model_path} is not a Hugging Face model folder: it has no config.json")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    device: dict[str, Any] = {
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager,
        "enable_sleep_mode": config.sleeps,
        # vLLM's default for an engine in a process is 2,048, too few to keep a GPU busy with prompts
        "max_num_batched_tokens": max(_BATCHED_TOKENS, config.max_num_seqs),
    }
    if current_platform.is_cpu():
        # Prefixes are shared in whole blocks, and 32 is the smallest block the CPU kernels support. Chunked prefill is
        # off because vLLM 0.32 rewinds a seeded request's generator after each chunk, which CPU generators cannot do.
        device = {
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            "block_size": 32,
            "enforce_eager": True,
            "enable_chunked_prefill": False,
        }
    fp32_head = not current_platform.is_cpu() if config.lm_head_fp32 is None else config.lm_head_fp32
    adapters: dict[str, Any] = {}
    if update.num_slots > 0:
        adapters = {
            "enable_lora": True,
            "max_lora_rank": engine_rank(config.lora_rank),
            "max_loras": update.num_slots + config.pins,
            "max_cpu_loras": update.num_slots + config.pins,
            "scheduling_policy": "priority" if config.pins else "fcfs",
            # Explicit, because by default vLLM also wraps the head, whose LoRA layer costs a vocabulary-sized product.
            "lora_target_modules": [
                *config.lora_targets,
                *(vision_linears(config.model_path) if config.adapt_vision else ()),
            ],
        }
    return EngineArgs(
        model=config.model_path,
        dtype="float32" if config.dtype == "fp32" else "bfloat16",
        max_model_len=config.max_model_len,  # pyright: ignore[reportArgumentType]  None is vLLM's default
        max_num_seqs=config.max_num_seqs,
        hf_overrides={**config_overrides(config.model_path), **({"head_dtype": "float32"} if fp32_head else {})},
        seed=config.seed,
        tensor_parallel_size=config.tensor_parallel,
        # Explicit, because in a placement group vLLM would choose Ray, which needs a bundle for each of its ranks.
        distributed_executor_backend="mp" if config.tensor_parallel > 1 else "uni",
        async_scheduling=update.async_scheduling,
        worker_extension_cls="actors.vllm_engine.worker_extension.SnapshotExtension",
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        # Part of the key of vLLM's cache of compiled code: code of stock vLLM, or without gains, would drop the gains.
        additional_config={"tora_gain_layers": 1, HAS_GAINS: config.gains},
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **adapters,
        **image_args(config.model_path, max_pixels=config.max_pixels, adapt_vision=config.adapt_vision),
        **device,
    )
