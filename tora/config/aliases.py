"""What other trainers call our keys, so that a config moved from one of them is answered with the right name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_TRL = {
    "num_generations": "grpo_samples",
    "num_train_epochs": None,
    "max_steps": "num_steps",
    "max_completion_length": "max_generated_tokens",
    "max_prompt_length": "max_prompt_tokens",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_steps": "lr_scheduler.num_warmup_steps",
    "warmup_ratio": "lr_scheduler.num_warmup_steps",
    "max_grad_norm": "clip_grad_norm",
    "beta": "loss.kl_coeff",
    "epsilon": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "delta": "loss.dual_clip",
    "loss_type": "loss",
    "scale_rewards": "normalize_advantages",
    "num_iterations": "ppo_epochs",
    "steps_per_generation": "num_mini_batches",
    "gradient_accumulation_steps": "micro_batch_tokens",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval.num_prompts",
    "reward_funcs": "rewards",
    "reward_weights": "rewards",
    "mask_truncated_completions": "mask_truncated",
    "use_vllm": "rollout.engine",
    "vllm_mode": "async_rl",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "vllm_enable_sleep_mode": "rollout.sleep",
    "vllm_tensor_parallel_size": "rollout.tensor_parallel",
    "gradient_checkpointing": "activation_checkpointing",
    "bf16": "dtype",
    "fp16": "dtype",
    "torch_dtype": "dtype",
    "model_name_or_path": "model.path",
    "dataset_name": "dataset",
    "train_dataset": "dataset",
    "eval_dataset": "eval.dataset",
    "use_dora": "model.lora_type",
    "use_peft": "model.lora_type",
    "lora_r": "model.lora_rank",
    "target_modules": "model.lora_targets",
    "lora_target_modules": "model.lora_targets",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "eval.every",
    "report_to": "metric_logger",
    "logging_steps": None,
    "run_name": "name",
    "shuffle_dataset": "shuffle",
    "generation_batch_size": "batch_size",
    "stop_strings": "stop",
}
_TORCHTUNE = {
    "tokenizer": "model.path",
    "checkpointer": "model.path",
    "forward_batch_size": "micro_batch_tokens",
    "ppo_batch_size": "micro_batch_tokens",
    "epochs": "num_steps",
    "steps_per_epoch": "num_steps",
    "lora_attn_modules": "model.lora_targets",
    "apply_lora_to_mlp": "model.lora_targets",
    "enable_activation_checkpointing": "activation_checkpointing",
    "enable_activation_offloading": "activation_offloading",
    "max_seq_len": "max_prompt_tokens",
}
_VERL = {
    "actor_rollout_ref.rollout.n": "grpo_samples",
    "actor_rollout_ref.rollout.temperature": "temperature",
    "actor_rollout_ref.rollout.top_p": "top_p",
    "actor_rollout_ref.rollout.top_k": "top_k",
    "actor_rollout_ref.rollout.name": "rollout.engine",
    "actor_rollout_ref.rollout.gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "actor_rollout_ref.rollout.free_cache_engine": "rollout.sleep",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "rollout.tensor_parallel",
    "actor_rollout_ref.model.path": "model.path",
    "actor_rollout_ref.model.lora_rank": "model.lora_rank",
    "actor_rollout_ref.model.lora_alpha": "model.lora_alpha",
    "actor_rollout_ref.model.target_modules": "model.lora_targets",
    "actor_rollout_ref.actor.optim.lr": "optimizer.lr",
    "actor_rollout_ref.actor.ppo_epochs": "ppo_epochs",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "num_mini_batches",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "micro_batch_tokens",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": "micro_batch_tokens",
    "actor_rollout_ref.actor.clip_ratio_low": "loss.clip_low",
    "actor_rollout_ref.actor.clip_ratio_high": "loss.clip_high",
    "actor_rollout_ref.actor.clip_ratio_c": "loss.dual_clip",
    "actor_rollout_ref.actor.entropy_coeff": "loss.entropy_coeff",
    "actor_rollout_ref.actor.kl_loss_coef": "loss.kl_coeff",
    "actor_rollout_ref.actor.kl_loss_type": "loss.kl_type",
    "actor_rollout_ref.actor.loss_agg_mode": "loss_normalization",
    "data.train_batch_size": "batch_size",
    "data.max_prompt_length": "max_prompt_tokens",
    "data.max_response_length": "max_generated_tokens",
    "data.train_files": "dataset",
    "data.val_files": "eval.dataset",
    "data.shuffle": "shuffle",
    "algorithm.adv_estimator": "advantage",
    "algorithm.norm_adv_by_std_in_grpo": "normalize_advantages",
    "algorithm.kl_ctrl.kl_coef": "loss.kl_coeff",
    "trainer.total_training_steps": "num_steps",
    "trainer.save_freq": "checkpoint.every",
    "trainer.test_freq": "eval.every",
    "trainer.logger": "metric_logger",
    "trainer.experiment_name": "name",
    "custom_reward_function.path": "rewards",
}
_COMMON = {
    "lr": "optimizer.lr",
    "kl_coef": "loss.kl_coeff",
    "kl_coeff": "loss.kl_coeff",
    "group_size": "grpo_samples",
    "max_new_tokens": "max_generated_tokens",
    "max_tokens": "max_generated_tokens",
    "max_length": "max_prompt_tokens",
    "train_batch_size": "batch_size",
    "steps": "num_steps",
    "rank": "model.lora_rank",
    "r": "model.lora_rank",
    "alpha": "model.lora_alpha",
    "reward": "rewards",
    "data": "dataset",
    "gpus": "learner_ranks",
    "system_prompt": "dataset.system_prompt",
    "enable_thinking": "chat_template_kwargs.enable_thinking",
}
ALIASES = {
    **{name: ("other trainers'", ours) for name, ours in _COMMON.items()},
    **{name: ("verl's", ours) for name, ours in _VERL.items()},
    **{name: ("torchtune's", ours) for name, ours in _TORCHTUNE.items()},
    **{name: ("TRL's", ours) for name, ours in _TRL.items()},
}
"""By another trainer's name of a key: whose it is, and our key; None where Tora has none."""


def ours_for(key: str, value: Any) -> str | None:
    """A sentence for an unknown key that another trainer has; None for any other. `value`: a mapping for a key whose
    fields are meant, such as verl's `data`."""
    for path in _paths(key, value):
        for name in (path, path.rpartition(".")[2]):
            if name not in ALIASES:
                continue
            whose, ours = ALIASES[name]
            if ours is None:
                return f"{whose} {name} has no equal here; `tora help` lists all keys."
            return f"{whose} {name} is {ours} here; `tora help {ours}` explains it."
    return None


def _paths(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _paths(f"{key}.{name}", inner)
    else:
        yield key
