"""Sections of the config: see `tora.config.schema`, which holds the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tora.config.bounds import Above, AtLeast, AtMost
from tora.config.marks import Resume

FREE = Resume.FREE


@dataclass(kw_only=True)
class SyncConfig:
    canary_every: Annotated[int, AtLeast(0)] = 10
    """Steps between canary checks, which compare the log-probs of learner and engines for the same tokens, with the
    adapter and without. The first sync is always checked. The run stops if they differ. 0: no checks at all."""
    canary_max_gap: Annotated[float, Above(0)] | None = None
    """Largest mean difference of a token's log-prob, in nats, that a canary check accepts. The check is stricter while
    the adapter's effect is small. null: 1e-4 if learner and engine both run in float32, otherwise 0.1."""


@dataclass(kw_only=True)
class CheckpointConfig:
    every: Annotated[int, AtLeast(1)] = 50
    """Steps between checkpoints. The last step always writes one, and so does a run that is interrupted."""
    keep: Annotated[int, AtLeast(1)] = 2
    """Number of newest checkpoints to keep; older ones are deleted."""


@dataclass(kw_only=True)
class RolloutConfig:
    engine: Literal["auto", "vllm", "torch"] = "auto"
    """What generates. `vllm`: vLLM. `torch`: the built-in engine; in a synchronous run it shares the learner's weights.
    `auto`: vLLM if it is installed, with three exceptions. It picks torch for a synchronous run of one rank on a CPU
    with `max_generated_tokens` of at most 64 and a base that is not quantized, where torch is as fast and needs less
    memory; for a synchronous run with `model.lora_type=full`; and for an adapter together with
    `model.train_vision=full`, which vLLM cannot serve."""
    num_workers: Annotated[int, AtLeast(1), FREE] = 1
    """Rollout workers at the start of the run. More than one needs `async_rl=true`."""
    tensor_parallel: Annotated[int, AtLeast(1), FREE] = 1
    """GPUs (or CPUs) of one node that share one worker's weights. More than one needs `async_rl=true` and vLLM."""
    min_workers: Annotated[int, AtLeast(1), FREE] | None = None
    """Rollout workers that an asynchronous run begins with, at most `num_workers`; the others join once the cluster has
    room for them and their engines are up. null: all of `num_workers`."""
    max_workers: Annotated[int, AtLeast(1), FREE] | None = None
    """Rollout workers that an asynchronous run may grow to, at least `num_workers`. Workers beyond `num_workers` wait
    until the cluster has room for them; an autoscaler sees them as demand. null: no workers are added."""
    concurrency: Annotated[int, AtLeast(1), FREE] = 16
    """Maximum number of groups that a worker generates at once. In an asynchronous run a worker is given fewer while
    its KV cache is nearly full."""
    group_timeout_s: Annotated[float, Above(0), FREE] = 1800.0
    """Seconds that a worker of an asynchronous run may take for one group or to load one snapshot. A slower worker is
    considered hung and is replaced. Must exceed the seconds that the rewards of a group may take: for each of them
    `1 + grpo_samples / reward_processes` times `reward_timeout_s`."""
    heartbeat_s: Annotated[float, Above(0), FREE] = 60.0
    """Seconds that a worker of an asynchronous run may take to answer a heartbeat, and vLLM for one step, apart from
    its first. A slower worker is considered hung and is replaced."""
    start_timeout_s: Annotated[float, Above(0), FREE] = 1800.0
    """Seconds that a worker of an asynchronous run may take to start, from the time the cluster has room for it."""
    max_restarts: Annotated[int, AtLeast(0), FREE] = 8
    """How often an asynchronous run may lose the workers of one place in a row, with no group finished there in
    between, before it ends. Losses while another worker is up never end it. 0: the first loss of the last one does."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Precision of vLLM's weights. null: the learner's, which is `dtype` at the top level."""
    base: Literal["dequantized", "checkpoint"] = "dequantized"
    """Base weights that vLLM serves with `model.quantize_base=true`. `dequantized`: the learner's NF4 weights,
    expanded; they are written to a folder in `output_dir` that is deleted when the run ends. `checkpoint`: the original
    weights in `model.path`, which needs no such folder but samples from a slightly different policy. `mismatch_kl`
    measures the gap in both cases."""
    update: Literal["between_rollouts", "in_flight"] = "between_rollouts"
    """When a new policy version takes effect. `between_rollouts`: for rollouts that start after it arrives.
    `in_flight`: at once; running rollouts sample their remaining tokens from it. `in_flight` needs `async_rl=true`,
    vLLM and `max_staleness` of at least 1."""
    recompute_kv: bool = False
    """With `update=in_flight`: recompute the keys and values of running rollouts under the new version. false keeps
    those of the old version, which costs nothing but makes later tokens attend to stale keys and values."""
    partial: Annotated[int, AtLeast(1)] | None = None
    """Interrupt each rollout every time it has generated this many tokens and continue it under the newest version.
    Each token keeps the version and log-prob it was sampled with; a rollout's staleness is that of its oldest token.
    Needs `async_rl=true`, `update=between_rollouts` and `max_staleness` of at least 1. null: rollouts are not
    interrupted."""
    max_model_len: Annotated[int, AtLeast(1), FREE] | None = None
    """Longest sequence in tokens, prompt and completion together, that vLLM accepts; it needs a KV cache of at least
    that size. At least `max_prompt_tokens + max_generated_tokens`. null: exactly that, or the model's own limit where
    that is lower or where the model takes images."""
    max_pixels: Annotated[int, AtLeast(1)] | None = None
    """Maximum number of pixels per image. Larger images are scaled down, identically in the engine and the learner.
    Only for models that take images. null: the limit of the model's image processor."""
    gpu_memory_utilization: Annotated[float, Above(0), AtMost(1), FREE] | None = None
    """Fraction of the GPU's memory that vLLM may use for weights and KV cache. null: 0.9 where an engine has a GPU to
    itself, 0.675 where it shares weights and takes turns with the learner (`share_base`, `sleep`), else 0.45 beside it,
    and less with more engines. No effect on a CPU."""
    sleep: Annotated[Literal[True, False, "auto"], FREE] = "auto"
    """Whether vLLM gives its KV cache back to the GPU while the learner steps, so that either can use what the other
    needs; cached prefixes are lost. `auto`: in every synchronous run on a GPU. true needs `async_rl=false` and vLLM.
    No effect on a CPU."""
    share_base: Annotated[bool, FREE] = True
    """In a synchronous run with an adapter on one GPU: the learner computes with the frozen weights that vLLM holds, as
    far as they are its own to the bit, instead of a second copy. No effect with `model.quantize_base=true`, with
    another `rollout.dtype` or on a CPU, where vLLM repacks weights for its kernels."""
    kv_cache_gib: Annotated[float, Above(0), FREE] = 0.25
    """Size of vLLM's KV cache on a CPU, in GiB. No effect on a GPU."""
    enforce_eager: Annotated[bool, FREE] = False
    """Generate without CUDA graphs: less memory and a faster start, but slower decoding. No effect on a CPU."""
    stragglers: Literal["wait", "oversample"] = "wait"
    """What a step of an asynchronous run does about slow groups. `wait`: it waits for those that no later step may
    train. `oversample`: more groups are started, each step trains the first `batch_size` that finish, and those that
    grow too old are aborted and their prompts generated again; batches then lean towards what is generated fast."""
    oversample: Annotated[float, AtLeast(0)] = 0.25
    """With `stragglers=oversample`: groups that are started beyond those that steps need, as a share of
    `batch_size`."""
    max_refills: Annotated[float, AtLeast(0)] | None = None
    """How many groups without a training signal (all rewards equal, to within a millionth) a step may drop and replace,
    as a multiple of `batch_size`. Beyond that they are kept; their advantages are 0, so that only a KL or entropy term
    acts on them. 0: none is replaced. null: 3, or 0 with a KL or entropy term, which then acts on every prompt."""
    refill_by: str | None = None
    """Name of one of `rewards`: a group whose rollouts all have the same score in it has no training signal either,
    even if their totals differ. DAPO filters by accuracy. null: only the total counts."""
