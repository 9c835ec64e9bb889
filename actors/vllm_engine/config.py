"""The settings of a `VLLMEngine`. Imports neither vLLM nor torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HAS_GAINS = "tora_has_gains"
"""Key of vLLM's `additional_config`: whether adapters may have gains; true without it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """One vLLM generator. A `WeightUpdate`, not this config, decides what happens to running requests at a sync.

    Example:
        EngineConfig(
            model_path="/models/Qwen3-0.6B",
            dtype="bf16",
            max_model_len=4096,
            lora_rank=16,
            lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
            seed=0,
            gpu_memory_utilization=0.5,
            kv_cache_gib=0.25,
            enforce_eager=False,
        )
    """

    model_path: str
    """Folder of a Hugging Face model."""
    dtype: Literal["bf16", "fp32"]
    """Precision of the weights, the KV cache and the adapter slots' A and B."""
    lm_head_fp32: bool | None = None
    """Whether logits are the float32 sums of the head's product; None for true on a GPU and false on a CPU."""
    max_model_len: int | None
    """Tokens of prompt and completion together; None for the model's own limit."""
    lora_rank: int
    """Largest adapter rank to serve, rounded up to the next rank that vLLM supports."""
    lora_targets: tuple[str, ...]
    """The decoder's linear layers that may carry an adapter, by their last name: `q_proj`, `down_proj`."""
    gains: bool = True
    """Whether adapters may have gains, as DoRA's do. Without, plain LoRA costs no more than in vLLM."""
    pins: bool = False
    """Room for one more adapter, which requests of low priority use while others are installed."""
    adapt_vision: bool = False
    """Also serve adapters on every linear layer of the vision tower."""
    max_pixels: int | None = None
    """Larger images are scaled down to this many pixels; None for the image processor's own limit."""
    seed: int
    """vLLM's own seed, which also seeds this process's random generators. Each request brings its own seed."""
    gpu_memory_utilization: float
    """Share of the GPU's memory, 0 to 1; ignored on a CPU."""
    kv_cache_gib: float
    """Size of the KV cache in GiB on a CPU; ignored on a GPU."""
    enforce_eager: bool
    """Run without CUDA graphs and compilation; always so on a CPU."""
    max_num_seqs: int = 256
    """Sequences that run at once; further ones wait."""
    sleeps: bool = False
    """Whether `VLLMEngine.sleep` frees the KV cache, in memory that vLLM then has to map itself. Needs a GPU."""
    gpu: int = 0
    """Index of the engine's GPU among those this process sees; ignored with `tensor_parallel` and on a CPU."""
    tensor_parallel: int = 1
    """Processes that share the weights, one per GPU. Above 1, generation stalls for a whole sync, not just its copy."""
