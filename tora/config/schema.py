"""The config of a run as dataclasses. Imports without torch, so that a wrong key is reported at once.

The docstring under a field is its documentation: `docs/config.md` and `tora help KEY` are made from it. A `Component`
is a mapping with `_component_`, the dotted path of a callable, and keyword arguments for that callable. `FIXED` and
`FREE` say what a changed value does to a resumed run; a key without either is applied, and the change is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tora.config.bounds import Above, AtLeast, AtMost, Below
from tora.config.marks import Resume
from tora.config.sections import CheckpointConfig, RolloutConfig, SyncConfig

FIXED, FIXED_COMPONENT, FREE = Resume.FIXED, Resume.FIXED_COMPONENT, Resume.FREE
Component = dict[str, Any]
ALL_LINEAR = "all-linear"
"""As `lora_targets`: every linear layer of the decoder."""
LossNormalization = Literal["token", "sequence", "constant"]
Advantage = Literal["grpo", "rloo", "reinforce++"]
Credit = Literal["episode", "turn"]
Implementation = Literal["auto", "native", "transformers"]
OverlongPrompts = Literal["drop", "error", "truncate_left"]
ActivationCheckpointing = Literal["none", "full", "selective"]


@dataclass(kw_only=True)
class ModelConfig:
    path: Annotated[str, FIXED]
    """Folder of a Hugging Face model: config, safetensors weights and tokenizer. A relative path is looked up in the
    working directory first and then in `configs/`. Or the name of a model on the hub, such as `Qwen/Qwen3-0.6B`, which
    is downloaded unless huggingface_hub's cache has it; the run's `config.yaml` pins its commit in `revision`."""
    revision: Annotated[str | None, FIXED] = None
    """Branch, tag or commit of a model on the hub. null: its main branch, or the commit that a resumed run has used."""
    implementation: Annotated[Implementation, FIXED] = "auto"
    """Code that the learner and the torch engine run. `native`: Tora's own, for the families that it knows.
    `transformers`: the model's class in transformers, with Tora's attention. `auto`: native where it can."""
    lora_type: Annotated[Literal["full", "lora", "dora", "dora_cache"], FIXED] = "lora"
    """What is trained. `full`: every weight of the decoder. `lora`, `dora`: an adapter of that kind. `dora_cache`: DoRA
    whose row norms are computed once per optimizer step instead of in every forward pass, which is faster."""
    train_vision: Annotated[Literal["none", "lora", "full"], FIXED] = "none"
    """What is trained in the vision tower and its mergers. `none`: nothing. `lora`: adapters of `lora_type` on all
    their linear layers; `lora_type` must then be an adapter. `full`: all their weights; with `rollout.engine=vllm` this
    needs `lora_type=full`. Only for models that take images."""
    lora_rank: Annotated[int, AtLeast(1), FIXED] = 8
    """Rank of the adapter. Ignored with `lora_type=full`."""
    lora_alpha: Annotated[float, Above(0), FIXED] = 32.0
    """Scaling of the adapter: its low-rank update is multiplied by `lora_alpha / lora_rank`. Ignored with
    `lora_type=full`."""
    use_rslora: Annotated[bool, FIXED] = False
    """Rank-stabilized LoRA: scale by `lora_alpha / sqrt(lora_rank)` instead of `lora_alpha / lora_rank`."""
    lora_dropout: Annotated[float, AtLeast(0), Below(1)] = 0.0
    """Fraction of an adapter's inputs that each training pass drops at random. Rollouts, evaluation, the KL reference
    and the log-probs that the clip is centered on use all of them. Dropout costs each step one more pass, for those
    log-probs. Ignored with `lora_type=full`."""
    lora_targets: Annotated[list[str] | str, FIXED] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear layers of the decoder that get an adapter. A list: by the last parts of their names in the Hugging Face
    model, such as `q_proj` or `mlp.up_proj`. Text: `all-linear` for all of them, or a regular expression that matches
    the whole names, such as `.*layers\\.[0-7]\\..*_proj`. `lm_head` and `embed_tokens` cannot have one. Ignored with
    `lora_type=full`."""
    adapter_path: str | None = None
    """Folder of a PEFT adapter to start from, looked up as `path` is. Its type, rank, alpha and target layers must be
    those of this config; its `rank_pattern` and `alpha_pattern` for single layers apply too. null: a new adapter, which
    leaves the base's outputs unchanged."""
    quantize_base: Annotated[bool, FIXED] = False
    """Keep the frozen base in NF4, about 4.13 bits per weight: QLoRA, or QDoRA with `lora_type=dora` or `dora_cache`.
    Needs an adapter. See `rollout.base` for the weights that vLLM serves."""

    @property
    def trains_whole(self) -> bool:
        """Whether weights of the model itself are trained, of which engines hold one version."""
        return self.lora_type == "full" or self.train_vision == "full"


@dataclass(kw_only=True)
class EvalConfig:
    dataset: Component
    """Held-out prompts: a dataset as in the top-level `dataset`."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further held-out sets by name, each a dataset as `dataset` is: `{math: {_component_: ...}}`. They are evaluated
    along with it, and their metrics are `eval/NAME/reward` and so on."""
    num_prompts: Annotated[int, AtLeast(1)] = 128
    """Number of prompts of each set, taken from the start of its dataset. A smaller dataset is used whole."""
    samples: Annotated[int, AtLeast(1)] = 1
    """Rollouts per prompt. With more than one, a run whose rewards declare an accuracy also gets pass@k."""
    every: Annotated[int, AtLeast(1)] = 10
    """Steps between evaluations. The policy is also evaluated after the last step."""
    at_start: bool = True
    """Evaluate before the first step too."""
    blocking: bool = False
    """Whether an asynchronous run pauses training while it evaluates. false: it trains on, and the held-out prompts run
    under the version they began with, on workers' spare room; a result is logged with that version's step when it is
    there. Synchronous runs, and those that train whole weights, always pause."""
    num_workers: Annotated[int, AtLeast(0), FREE] | None = None
    """Workers for evaluations alone, beside `rollout.num_workers`, for an asynchronous run that trains on while it
    evaluates. They cost training no time where the machine has a processor to spare, or the cluster a GPU; a processor
    is theirs when nothing else wants it. Until one is up, and before the run ends, the rollout workers help. 0: they do
    all of it. null: 1 on a machine without GPUs, if the plan of the run with it, and 1.2 GiB for each process, come to
    at most half of the memory; 0 on GPUs, whose engines have room for evaluations, and in a cluster that is joined."""
    keep_best: bool = False
    """Export the policy to the folder `best` in `output_dir` whenever the held-out reward of `dataset` is higher than
    it has been."""
    early_stop: Annotated[int, AtLeast(1)] | None = None
    """End the run after this many evaluations in a row in which the held-out reward of `dataset` was not higher than
    it has been. null: never."""
    temperature: Annotated[float, AtLeast(0)] = 1.0
    """Sampling temperature of the evaluation. 0: greedy decoding."""
    top_k: Annotated[int, AtLeast(0)] = 0
    """As the top-level `top_k`, for the evaluation."""
    top_p: Annotated[float, Above(0), AtMost(1)] = 1.0
    """As the top-level `top_p`, for the evaluation."""
    min_p: Annotated[float, AtLeast(0), AtMost(1)] = 0.0
    """As the top-level `min_p`, for the evaluation."""
    repetition_penalty: Annotated[float, Above(0)] = 1.0
    """As the top-level `repetition_penalty`, for the evaluation."""
    stop: list[str] | None = None
    """As the top-level `stop`, for the evaluation. null: the same strings."""
    seed: Annotated[int, AtLeast(0), AtMost(2**63 - 1)] | None = None
    """Seed of the evaluation's sampling. null: the run's."""


@dataclass(kw_only=True)
class RunConfig:
    name: Annotated[str, FREE]
    """Name of the run, shown on the console and used in the default `output_dir`. Must not be empty."""
    output_dir: Annotated[str, FREE] = "outputs/${name}"
    """Folder for config, metrics, checkpoints, adapter and reward curve. A relative path starts at `TORA_OUTPUT_ROOT`
    if that is set, otherwise at the working directory, or at the home folder in a submitted Ray job. A folder left by
    an earlier run is renamed, not overwritten, unless the run resumes from it; one that holds anything else, or that
    another run is using, is an error."""
    seed: Annotated[int, AtLeast(0), AtMost(2**63 - 1)] = 0
    """Seed of the adapter's initial weights, the order of prompts and the sampling of rollouts."""
    device: Annotated[Literal["auto", "cpu", "cuda"], FREE] = "auto"
    """Where to run. `auto`: on GPUs if there are any, otherwise on the CPU. With `cuda` a run on a cluster waits for
    GPU nodes that have not joined yet."""
    whole_gpus: Annotated[bool, FREE] = False
    """An asynchronous run waits until the cluster has a GPU for each rank and worker. false: they get equal shares of
    GPUs if it has fewer when the run starts."""
    marked_nodes: Annotated[bool | None, FREE] = None
    """Ranks of an asynchronous run keep to nodes that were started with Ray's resource `tora_learner`, and workers to
    those with `tora_rollout`; the run waits for such nodes. null: if there are any when the run starts."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the base weights. Adapters and optimizer state are always float32."""
    lm_head_fp32: bool | None = None
    """With bf16: keep the float32 sums of the head's product, in the learner and the engines. false rounds logits to
    bf16, which moves a log-prob by several hundredths of a nat, and the more the lower the temperature. null: true on a
    GPU, whose kernels write float32 directly; false on a CPU, where it needs a second product."""
    memory_plan: Annotated[Literal["refuse", "warn"], FREE] = "refuse"
    """What happens to a run that does not fit into its GPU's memory by `tora plan`. `refuse`: it does not start.
    `warn`: it starts with a warning, as a run on a CPU does unless its weights alone exceed the machine's memory."""
    num_threads: Annotated[int, AtLeast(0), AtMost(4096), FREE] = 0
    """CPU threads of each learner process. 0: PyTorch's default."""

    import_from: Annotated[list[str] | None, FREE] = None
    """Folders to import components from, after the working directory. null: the folder of the config file."""

    learner_ranks: Annotated[int, AtLeast(1), FREE] = 1
    """Learner processes, which share weights and work by FSDP2: of this machine in a synchronous run, Ray actors with
    `async_rl=true`. `--nproc_per_node` sets it too."""
    fsdp_reshard_after_forward: Annotated[bool, FREE] = True
    """With several ranks: free a layer's gathered weights after its forward pass and gather them again for the backward
    pass. false is faster and needs more memory."""
    fsdp_cpu_offload: Annotated[bool, FREE] = False
    """With several ranks: keep weights, gradients and optimizer state in CPU memory. Slower, for models that do not fit
    on the GPUs."""

    compile: Annotated[bool, FREE] = False
    """Run torch.compile on the model's layers, in the learner and in the torch engine. The first steps take minutes
    longer."""
    activation_checkpointing: Annotated[ActivationCheckpointing, FREE] = "none"
    """Which layers keep only their input for the backward pass and recompute the rest: `none`, all (`full`) or every
    other one (`selective`). Saves memory at the cost of a second forward pass through those layers."""
    activation_offloading: Annotated[bool, FREE] = False
    """Keep the inputs of checkpointed layers in CPU memory until the backward pass. Needs a GPU and
    `activation_checkpointing`."""

    async_rl: bool = False
    """true: rollout workers and learner run as Ray actors, and generation overlaps with training. false: everything
    runs in this process, and generation and training alternate."""
    max_staleness: Annotated[int, AtLeast(0)] = 1
    """With `async_rl`: largest number of policy versions by which a rollout's oldest token may lag behind the learner
    when it is trained on. 0: generation and training alternate, as in a synchronous run."""
    max_learner_restarts: Annotated[int, AtLeast(0), FREE] = 3
    """With `async_rl`: how many times the learner is restarted from the same checkpoint after a rank is lost, before
    the run ends. A newer checkpoint starts the count again."""
    learner_timeout_s: Annotated[float, Above(0), FREE] = 1800.0
    """With `async_rl`: seconds that a learner rank may take to start, or for a micro-batch, an optimizer update, a
    snapshot, a checkpoint or an export. A slower rank is considered hung: it writes the stacks of its threads into
    `logs/` in `output_dir` and ends, and the learner is restarted. So it is if its process answers nothing for as long.
    """
    resume_from_checkpoint: Annotated[Literal[True, False, "auto"], FREE] | None = None
    """Whether to continue from the newest intact checkpoint in `output_dir`. true: it is an error if there is none.
    false: start a new run. `auto`: continue if there is one, otherwise start, so that one command serves the first try
    and every retry. null: `auto` in a submitted Ray job, otherwise false."""

    num_steps: Annotated[int, AtLeast(1)] = 100
    """Training steps of the whole run. A resumed run counts the steps already done."""
    batch_size: Annotated[int, AtLeast(1)] = 16
    """Prompts per step; each gives one group of `grpo_samples` rollouts."""
    shuffle: bool = True
    """Read `dataset` in a new random order in each epoch, by `seed`. false: in its own order, as evaluation does."""
    prompt_process: bool | None = None
    """With `async_rl`: make the training prompts in a process of their own, which has its own tokenizer and dataset and
    hands images to rollout workers and learner directly. It leaves the driver, which all groups pass through, without
    the work of images. null: if the first prompt has an image of at least 100 KiB. A dataset object of a Python
    program stays in the driver."""
    grpo_samples: Annotated[int, AtLeast(2)] = 8
    """Rollouts per prompt: the group whose rewards are compared with one another."""
    max_prompt_tokens: Annotated[int, AtLeast(1)] = 1024
    """Longest prompt in tokens, chat template and image tokens included. A model that takes fewer tokens than this and
    `max_generated_tokens` together sets a lower limit."""
    overlong_prompts: OverlongPrompts = "drop"
    """What happens to a longer prompt, in training and evaluation. `drop`: it is left out, and another takes its turn.
    `error`: the run ends. `truncate_left`: it loses its first tokens, which may be those of the system prompt; prompts
    with images are dropped. The first one is named, and `rollout/prompts_dropped` counts those dropped in training."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables for the model's chat template, such as `enable_thinking: false` for Qwen3. It is an error if the
    template does not mention one. null: none."""
    chat_template: str | None = None
    """File with a chat template, in the working directory or the config's folder. null: the model's own template."""
    max_generated_tokens: Annotated[int, AtLeast(1)] = 512
    """Longest completion in tokens, in training and evaluation. A completion that reaches it is cut off. With tools it
    covers all turns of a rollout and the tools' answers between them."""
    temperature: Annotated[float, Above(0)] = 1.0
    """Sampling temperature of training rollouts. The learner computes log-probs at the same temperature."""
    top_k: Annotated[int, AtLeast(0)] = 0
    """Sample only from the k most likely tokens. 0: from all of them."""
    top_p: Annotated[float, Above(0), AtMost(1)] = 1.0
    """Nucleus sampling: sample only from the most likely tokens that together have this probability. 1: from all of
    them."""
    min_p: Annotated[float, AtLeast(0), AtMost(1)] = 0.0
    """Sample only from tokens at least this many times as likely as the most likely one. 0: from all of them."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion, such as `["</answer>"]`; they stay in it. Not with `rollout.partial` or tools."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end a completion, in training and evaluation, besides the model's own end tokens."""
    repetition_penalty: Annotated[float, Above(0)] = 1.0
    """Above 1: tokens that the prompt or the completion already contains become less likely. 1: off."""
    ppo_epochs: Annotated[int, AtLeast(1)] = 1
    """Passes over each step's batch. Each pass makes one optimizer update per mini-batch."""
    num_mini_batches: Annotated[int, AtLeast(1)] = 1
    """Parts into which each step's batch is cut, with an optimizer update for each. All ratios are to the policy before
    the first update, so the loss's clip acts from the second on. Whole groups are dealt to them at random, reproducibly
    by `seed`. At most `batch_size`."""
    step_parts: Annotated[int, AtLeast(1), FREE] | None = None
    """With `async_rl`: the most parts in which the learner takes a step, so that it can begin one while the last groups
    are still generated. A part is at least this share of `batch_size`; groups that are there already are one. The
    gradients of all parts make one update, which equals that of a whole step up to rounding. Needs one update a step,
    `loss_normalization` `token` or `sequence`, and advantages that compare a group's own rollouts. 1: a step begins
    once all its groups are there. null: 4 where that can be, with `max_staleness` of at least 1 and a loss of Tora's
    own; else 1."""
    micro_batch_tokens: Annotated[int, AtLeast(1), FREE] = 8192
    """Tokens that are packed into one forward and backward pass, prompts included. It bounds the learner's memory and
    does not change the result. A sequence longer than this gets a pass to itself."""
    share_prefix: Annotated[bool, FREE] | None = None
    """Run a group's prompt through the learner once instead of once per completion. The result is the same. It saves
    more time the longer prompts are relative to completions. null: in every step in which it saves a fifth of the
    tokens, from where on it is faster on a CPU; never on a GPU, where that is not measured, or with `compile`."""
    advantage: Advantage = "grpo"
    """What a rollout's reward is compared with. `grpo`: its group's mean, see `normalize_advantages`. `rloo`: the mean
    of the other rollouts of its group (leave one out); needs `normalize_advantages=false`. `reinforce++`: its group's
    mean; the result is normalized by mean and standard deviation over the tokens of the whole batch."""
    credit: Credit = "episode"
    """What an advantage belongs to. `episode`: all tokens of a rollout share one. `turn`: each turn has its own:
    the reward still to come, compared with that of the same turn of its group's other rollouts; the environment's
    method `get_turn_reward` says what a turn has earned. See `docs/agents.md`."""
    normalize_advantages: bool = True
    """Divide each group's advantages (reward minus the group's mean) by the standard deviation of its rewards. Dr. GRPO
    sets it to false. Ignored with `advantage=reinforce++`, which always normalizes."""
    mask_truncated: bool = False
    """Leave completions that were cut off, at `max_generated_tokens` for instance, out of the loss. Their rewards still
    count in their group's mean and standard deviation."""
    loss_normalization: LossNormalization = "token"
    """How token losses are averaged. `token`: mean over all response tokens. `sequence`: mean over sequences of each
    sequence's token mean. `constant`: sum over all response tokens, divided by what the config asks for:
    `batch_size * grpo_samples * max_generated_tokens`, whatever was kept (by a mini-batch's share of it)."""
    clip_grad_norm: Annotated[float, Above(0)] | None = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it. null: no clipping."""
    max_bad_steps: Annotated[int, AtLeast(0), FREE] = 3
    """The run ends after this many bad steps in a row. A step is bad if its loss or the norm of its gradient is not
    finite; it is left out, so that weights and optimizer state stay as they were, and no checkpoint is written until a
    good step follows. 0: bad steps never end the run."""
    max_idle_steps: Annotated[int, AtLeast(0), FREE] = 10
    """The run ends after this many steps in a row that trained nothing, because no group had a training signal, with
    exit code 1; checkpoint and result are written as at the end. 0: such steps never end the run."""

    model: ModelConfig
    """The model and which of its weights are trained."""
    dataset: Component
    """Training prompts: a callable that returns a dataset, anything with `len` and `[i]` whose rows have a `prompt`.
    Built in: `tora.tasks.gsm8k.gsm8k`, `tora.tasks.sums.sums`, `tora.tasks.chain_sum.chain_sum`,
    `tora.tasks.digits.digits`, `tora.tasks.clevr.clevr`, `tora.tasks.geometry3k.geometry3k`,
    `tora.tasks.dataset.file_dataset` and `hub_dataset` for your own data, and `tora.tasks.mixture.mixture` for several
    datasets."""
    rewards: list[Component]
    """Reward functions with TRL's signature, at least one. Built in: `tora.rewards.math_answer`, `answer_tag`,
    `last_number`, `format`, `length` and `overlong`. Besides `_component_` and its arguments an entry may have `weight`
    (default 1), `name` (default: the function's name), `timeout_score` (default 0), the score of a completion on
    which the function takes too long, and `accuracy: true`, which declares that a score of at least 1 means a right
    answer; `math_answer`, `answer_tag` and `last_number` do so by themselves. A rollout's reward is the weighted sum;
    accuracy is the share of rollouts that score at least 1 in the first reward that declares it."""
    reward_timeout_s: Annotated[float, Above(0), FREE] = 30.0
    """Seconds that one reward function may take for a group. A slower call is stopped. If a call fails as a whole, each
    completion is tried again alone and may take as long, `reward_processes` at a time. One that fails again has a
    failed reward; one that takes too long again stays in its group and scores the `timeout_score` of that reward."""
    reward_processes: Annotated[int, AtLeast(1), FREE] = 4
    """Maximum number of processes per rollout worker that run reward functions. Another one starts only when all are
    busy."""
    max_failed_rewards: Annotated[float, AtLeast(0), AtMost(1), FREE] = 0.5
    """The run ends if more than this fraction of the rollouts in the last `batch_size` groups has failed. A reward
    fails if its function raises, exceeds `reward_timeout_s`, or returns NaN, infinity or the wrong number of scores, if
    every function returns None, or if the weighted sum overflows; a rollout fails too if the engine's log-prob of one
    of its tokens is not finite. It is dropped from its group, unless its reward took too long; a group with fewer than
    two rollouts left is replaced."""
    environment_factory: Component | None = None
    """The environment that a rollout acts in: a class or callable with TRL's contract, whose public methods are the
    model's tools. Several by name, `{NAME: {_component_: ...}, ...}`, if the dataset has a column `environment` that
    names each row's. Built in: `tora.tasks.guess_number.GuessNumber`. null: none. See `docs/agents.md`."""
    tools: list[str] = field(default_factory=list)
    """Dotted paths of functions that the model may call, beside the environment's methods or without an environment.
    Their type hints and docstrings become the schemas that the chat template shows. Built in:
    `tora.tasks.calculator.calculate`."""
    agent: str | None = None
    """Dotted path of a program that plays a rollout itself, instead of `environment_factory` and `tools`: a function
    `f(base_url, api_key, **row)` that asks the policy through an OpenAI-compatible endpoint and returns its reward.
    `environment_timeout_s` is its time. Needs the extra `agents`. null: the engine answers the prompt, with tools if
    there are any. See `docs/agents.md`."""
    agent_python: Annotated[str | None, FREE] = None
    """The Python interpreter that runs `agent`, such as `~/other/bin/python`: for a program whose packages cannot be
    installed beside Tora's. It needs nothing of Tora's. null: the run's own."""
    agent_address: Annotated[Literal["loopback", "cluster"], FREE] = "loopback"
    """Where the endpoint for `agent` listens: `loopback`, for programs beside their rollout worker; `cluster`, the
    machine's own address in its network, for what they start in containers or on other machines. Each rollout's key
    protects it either way, without encryption."""
    tool_parser: str = "hermes"
    """The format in which the model calls tools. `hermes` (also Qwen2.5 and Qwen3) is built in; other names are those
    of vLLM's tool parsers, such as `llama3_json` and `mistral`, and need vLLM."""
    max_tool_calling_iterations: Annotated[int, AtLeast(1)] | None = None
    """How often a rollout's tool calls are answered; a call after that ends it. null: until its tokens are used up."""
    environment_timeout_s: Annotated[float, Above(0)] = 30.0
    """Seconds to reset, or to answer the tool calls of one turn. A slower environment costs its rollout."""
    environment_processes: Annotated[int, AtLeast(1)] = 4
    """Maximum number of processes per rollout worker that hold environments and run tools. Another one starts only when
    all are in use."""
    environment_memory_gib: Annotated[float, Above(0)] = 8.0
    """GiB that such a process may allocate. One that holds three quarters of it is replaced between groups."""
    loss: Component = field(default_factory=lambda: {"_component_": "learner.loss.GRPOLoss"})
    """The objective: `learner.loss.GRPOLoss`, `DrGRPOLoss`, `DAPOLoss`, `GSPOLoss`, `CISPOLoss`, `DPPOLoss` or
    `SAPOLoss`. The files `base/dr_grpo.yaml`, `dapo.yaml`, `gspo.yaml`, `cispo.yaml`, `dppo.yaml` and `sapo.yaml` set
    the other keys that each objective needs. Arguments: `clip_low` and `clip_high`, the clip bounds; `dual_clip`, a
    bound on the push of negative advantages; `entropy_coeff`, the weight of an entropy bonus; `kl_coeff`, the weight of
    the KL penalty, 0 for none; `reference`, the policy that it pulls to (`initial`: the one that training began with,
    `base`: the base model without an adapter); `kl_type`, its estimator (`k1`, `k2`, `k3`); `kl_in`, whether it is part
    of the `loss` or the `reward`; `proximal`, the policy that the clip is centered on (`learner`: the one at the start
    of the step, `actor`: the one that sampled); `importance_correction` between learner and actor (`token_tis`,
    `token_mask`, `sequence_tis`, `sequence_mask`, `none`) with its bounds `importance_low` and `importance_high`. The
    page on losses has the others."""
    optimizer: Annotated[Component, FIXED_COMPONENT] = field(
        default_factory=lambda: {"_component_": "torch.optim.AdamW", "lr": 1e-4}
    )
    """The optimizer: a callable that takes the list of trained parameters. `lr`, a number greater than 0, is
    required."""
    lr_scheduler: Component = field(
        default_factory=lambda: {"_component_": "transformers.get_constant_schedule_with_warmup", "num_warmup_steps": 0}
    )
    """Learning-rate schedule: a callable that takes the optimizer, and `num_training_steps` if it has such a parameter.
    It advances once per step, not once per optimizer update. A warm-up starts above 0: step k of W, counted from 1, has
    k / W of the learning rate."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Generation of rollouts: engine, workers and weight updates."""
    sync: Annotated[SyncConfig, FREE] = field(default_factory=SyncConfig)
    """Checks that the engines serve the policy that the learner sent."""
    eval: Annotated[EvalConfig, FREE] | None = None
    """Evaluation on held-out prompts. null: none."""
    checkpoint: Annotated[CheckpointConfig, FREE] = field(default_factory=CheckpointConfig)
    """When checkpoints are written and how many are kept."""
    metric_logger: Annotated[list[Component], FREE] = field(default_factory=list)
    """Metric loggers in addition to the console and `metrics.jsonl`, such as torchtune's
    `torchtune.training.metric_logging.WandBLogger` and `TensorBoardLogger`. A logger with a `log_dir` parameter writes
    to the run's folder unless the config says otherwise, and one with `run_id` or `run_name` gets the run's. Also
    `tora.reporting.mlflow.MLflowLogger` and `tora.reporting.trackio.TrackioLogger`."""
    push_to_hub: Annotated[bool, FREE] = False
    """Upload the trained policy, with a model card, to a repository on the Hugging Face hub, which is made if it does
    not exist. Needs `hf auth login` or `HF_TOKEN`. An upload that fails never ends the run."""
    hub_model_id: Annotated[str | None, FREE] = None
    """With `push_to_hub`: the repository, such as `owner/name`. null: `name`, of the user who is logged in."""
    hub_strategy: Annotated[Literal["end", "every_save"], FREE] = "every_save"
    """With `push_to_hub`: `every_save` uploads the policy of every checkpoint in the background, each as a commit, one
    at a time; `end` only the last."""
    hub_private_repo: Annotated[bool, FREE] = False
    """With `push_to_hub`: a repository that is made is private."""
    log_completions: Annotated[int, AtLeast(0), FREE] = 10
    """Steps between tables of completions, `completions/step_N.parquet` in `output_dir`: prompt, completion, each
    reward, advantage and images of every rollout trained on. Weights & Biases, TensorBoard, MLflow and trackio show
    the first rows. 0: none."""
