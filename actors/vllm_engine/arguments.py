"""vLLM 0.32's engine arguments for a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from actors.vllm_engine.images import image_args, vision_linears

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs


def engine_rank(rank: int) -> int:
    """The smallest LoRA rank of vLLM's that holds `rank`. Errors: ValueError above the largest."""
    from vllm.config.lora import MaxLoRARanks

    allowed = get_args(MaxLoRARanks)
    if not 0 < rank <= allowed[-1]:
        raise ValueError(f"lora_rank {rank} is outside of what vLLM can serve, 1 to {allowed[-1]}")
    return next(r for r in allowed if r >= rank)


def engine_args(
    model_path: str,
    *,
    dtype: Literal["bf16", "fp32"],
    max_model_len: int | None,
    lora_rank: int,
    lora_targets: Sequence[str],
    adapt_vision: bool,
    max_pixels: int | None,
    num_slots: int,
    async_scheduling: bool | None,
    seed: int,
    gpu_memory_utilization: float,
    kv_cache_gib: float,
    enforce_eager: bool,
    tensor_parallel: int,
) -> EngineArgs:
    """Errors: ValueError for an impossible argument."""
    if not Path(model_path, "config.json").is_file():
        raise ValueError(f"{model_path} is not a Hugging Face model folder: it has no config.json")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    device: dict[str, Any] = {"gpu_memory_utilization": gpu_memory_utilization, "enforce_eager": enforce_eager}
    if current_platform.is_cpu():
        # 32 is the smallest block its kernels take: prefixes are shared in whole blocks. vLLM 0.32 rewinds a seeded
        # request's generator after each chunk of a prompt, which torch's CPU generators cannot do: no chunks.
        device = {
            "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
            "block_size": 32,
            "enforce_eager": True,
            "enable_chunked_prefill": False,
        }
    adapters: dict[str, Any] = {}
    if num_slots > 0:
        adapters = {
            "enable_lora": True,
            "max_lora_rank": engine_rank(lora_rank),
            "max_loras": num_slots,
            "max_cpu_loras": num_slots,
            # Named, because by default vLLM wraps the head too, whose LoRA layer costs a product with the vocabulary.
            "lora_target_modules": [*lora_targets, *(vision_linears(model_path) if adapt_vision else ())],
        }
    return EngineArgs(
        model=model_path,
        dtype="float32" if dtype == "fp32" else "bfloat16",
        max_model_len=max_model_len,  # pyright: ignore[reportArgumentType]  None is vLLM's default
        seed=seed,
        tensor_parallel_size=tensor_parallel,
        # Named: in a placement group vLLM would choose Ray, which wants a bundle for each of its ranks.
        distributed_executor_backend="mp" if tensor_parallel > 1 else "uni",
        async_scheduling=async_scheduling,
        worker_extension_cls="actors.vllm_engine.worker_extension.SnapshotExtension",
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        # vLLM's cache of compiled code is keyed by its configuration: without a difference, code that stock vLLM left
        # there would be taken, and drop the gains.
        additional_config={"tora_gain_layers": 1},
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **adapters,
        **image_args(model_path, max_pixels=max_pixels, adapt_vision=adapt_vision),
        **device,
    )
