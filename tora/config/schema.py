"""The run's config as dataclasses. Imports without torch, so that a wrong key is answered at once.

A field's docstring is its documentation. A `Component` is a mapping with `_component_`, the dotted path of a
callable, and that callable's keyword arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Component = dict[str, Any]
LossNormalization = Literal["token", "sequence", "constant"]
ActivationCheckpointing = Literal["none", "full", "selective"]


@dataclass(kw_only=True)
class ModelConfig:
    path: str
    """Hugging Face folder; relative paths are tried from the working directory, then from `configs/`."""
    lora_type: Literal["full", "lora", "dora", "dora_cache"] = "lora"
    """`full` trains every weight of the decoder; `dora_cache` keeps DoRA's row norms between optimizer steps."""
    train_vision: Literal["none", "lora", "full"] = "none"
    """The vision tower and its mergers: frozen, with adapters of `lora_type` on all of their linear layers, or all of
    their weights. With vLLM `full` needs `lora_type: full`; `lora` needs an adapter."""
    lora_rank: int = 8
    lora_alpha: float = 32.0
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Names of the decoder's linear layers, as the Hugging Face model calls them."""
    adapter_path: str | None = None
    """PEFT folder to start from."""
    quantize_base: bool = False
    """Keep the frozen base in NF4, about 4.13 bits a weight: QLoRA, QDoRA."""


@dataclass(kw_only=True)
class RolloutConfig:
    engine: Literal["auto", "vllm", "torch"] = "auto"
    """`auto`: vLLM where it is installed, else torch; torch too for a synchronous run of `lora_type: full`, whose
    weights it shares with the learner, and for adapters beside `train_vision: full`."""
    num_workers: int = 1
    """Rollout workers that the run starts with; more than one needs `async_rl=true`."""
    tensor_parallel: int = 1
    """With `async_rl` and vLLM: GPUs, and CPUs, that share one worker's weights. They must be of one node."""
    max_workers: int | None = None
    """With `async_rl`: how many there may be once others have joined. Each waits for room in the cluster, which an
    autoscaler sees as demand; null: none join."""
    concurrency: int = 16
    """Groups a worker has in flight, at most: fewer while its KV cache is too full."""
    group_timeout_s: float = 1800.0
    """A worker that takes longer for a group, or for a snapshot, is taken to hang and is restarted."""
    heartbeat_s: float = 60.0
    """A worker that does not answer for so long is taken to hang and is restarted."""
    start_timeout_s: float = 1800.0
    """How long a worker may take to start, once the cluster has room for it."""
    max_restarts: int = 8
    """Workers that may be lost in a row, no group finished between them, before the run ends."""
    dtype: Literal["bf16", "fp32"] | None = None
    """vLLM's weights; the learner's `dtype` where null."""
    base: Literal["dequantized", "checkpoint"] = "dequantized"
    """vLLM's base under `model.quantize_base`: the learner's weights, by way of a folder in `output_dir` that lasts as
    long as the run; or those of `model.path`, which are not the policy's. `mismatch_kl` shows the gap either way."""
    update: Literal["between_rollouts", "in_flight"] = "between_rollouts"
    """When a new policy version takes over: from the next rollout on, or within running ones, whose later tokens are
    then the new version's; vLLM with `async_rl`."""
    recompute_kv: bool = False
    """With `update: in_flight`: compute the keys and values that running rollouts have so far again under the new
    version, instead of keeping them."""
    partial: int | None = None
    """Cut rollouts after so many tokens and continue them under the newest version; they keep each token's version and
    log-prob, and count as old as their oldest token. With `async_rl` and `update: between_rollouts`."""
    max_model_len: int | None = None
    """vLLM's longest sequence; the model's own where null."""
    max_pixels: int | None = None
    """Larger images are scaled down to at most this many pixels, in engine and learner alike; the limit of the model's
    own image processor where null."""
    gpu_memory_utilization: float = 0.5
    """Share of the GPU that vLLM takes; unused on a CPU."""
    kv_cache_gib: float = 0.25
    """vLLM's KV cache on a CPU; unused on a GPU."""
    enforce_eager: bool = False
    """Without CUDA graphs."""
    max_refills: float = 3.0
    """Groups without signal that a step may drop and replace, as a multiple of `batch_size`."""


@dataclass(kw_only=True)
class SyncConfig:
    canary_every: int = 10
    """Steps between comparisons of the learner's and every engine's log-probs on fixed tokens, with the adapter and
    without; there is one at the start in any case, and 0 is never. The run stops where they differ."""
    canary_max_gap: float | None = None
    """Largest mean difference of a token's log-prob; where null, 1e-4 between float32 and 0.1 with bf16 on a side."""


@dataclass(kw_only=True)
class EvalConfig:
    dataset: Component
    num_prompts: int = 128
    every: int = 10
    """Steps between evaluations; there is one before the first step and one after the last in any case."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    """As the training rollouts' keys of the same names; evaluation has its own."""
    repetition_penalty: float = 1.0


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 50
    """Steps between checkpoints; the last step always writes one."""
    keep: int = 2


@dataclass(kw_only=True)
class RunConfig:
    name: str
    output_dir: str = "outputs/${name}"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["bf16", "fp32"] = "bf16"
    """The base's dtype. Adapters and optimizer state are float32 whatever this says."""
    num_threads: int = 0
    """CPU threads of the learner; 0 leaves torch's choice."""

    learner_ranks: int = 1
    """Processes that share the learner's weights and work; `--nproc_per_node` sets it too."""
    fsdp_reshard_after_forward: bool = True
    """With several ranks: give up other ranks' weights between a layer's forward and backward."""
    fsdp_cpu_offload: bool = False
    """With several ranks: keep weights, gradients and optimizer state in the CPU's memory."""

    compile: bool = False
    """torch.compile the learner's layers; the first steps take minutes longer."""
    activation_checkpointing: ActivationCheckpointing = "none"
    """Keep only the input of every layer (`full`) or every other layer (`selective`) and compute the rest again in the
    backward pass."""
    activation_offloading: bool = False
    """On a GPU, with `activation_checkpointing`: keep those inputs in the CPU's memory meanwhile."""

    async_rl: bool = False
    """Rollout workers and the learner as Ray actors, instead of everything in this process."""
    max_staleness: int = 1
    """With `async_rl`: the most steps by which a rollout may lag the learner; 0 is the synchronous schedule."""
    max_learner_restarts: int = 3
    """With `async_rl`: how often a lost learner is started again from the newest checkpoint before the run ends."""
    resume_from_checkpoint: bool = False
    """Go on from the newest checkpoint in `output_dir`."""

    num_steps: int = 100
    batch_size: int = 16
    """Prompts a step."""
    grpo_samples: int = 8
    """Rollouts a prompt: the group size."""
    max_prompt_tokens: int = 1024
    """Longer prompts are an error."""
    max_generated_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Drop tokens less probable than this share of the most probable one; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that prompt or completion already have become less probable; 1 is off."""
    ppo_epochs: int = 1
    """Optimizer passes over one batch; each is one optimizer update, all of them one step."""
    micro_batch_tokens: int = 8192
    """Packed tokens a forward-backward; a longer sequence stands alone."""
    share_prefix: bool = False
    """A group's prompt goes through the learner once, not once for each completion: the same numbers, and faster the
    longer prompts are beside completions."""
    normalize_advantages: bool = True
    """Divide the group's centred rewards by their standard deviation."""
    loss_normalization: LossNormalization = "token"
    """`token`: mean over response tokens; `sequence`: mean over sequences of their token means; `constant`: mean over
    sequences of their token sums, over `max_generated_tokens`."""
    clip_grad_norm: float | None = 1.0

    model: ModelConfig
    dataset: Component
    rewards: list[Component]
    """Each may carry `weight` (default 1) beside its `_component_`."""
    reward_timeout_s: float = 30.0
    """How long a reward function may take for a group."""
    reward_processes: int = 4
    """Processes that run a rollout worker's reward functions, at most; more than one start only while all are busy."""
    max_failed_rewards: float = 0.5
    """The run ends when more than this share of rollouts fails because a reward function raises, hangs, or returns NaN,
    nothing, or another number of scores. A failed rollout leaves its group; fewer than two rollouts are no group."""
    loss: Component = field(default_factory=lambda: {"_component_": "learner.loss.GRPOLoss"})
    optimizer: Component = field(default_factory=lambda: {"_component_": "torch.optim.AdamW", "lr": 1e-4})
    lr_scheduler: Component = field(
        default_factory=lambda: {"_component_": "transformers.get_constant_schedule_with_warmup", "num_warmup_steps": 0}
    )
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    eval: EvalConfig | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metric_logger: list[Component] = field(default_factory=list)
    """Beside the console and `metrics.jsonl`, e.g. torchtune's WandBLogger and TensorBoardLogger."""
