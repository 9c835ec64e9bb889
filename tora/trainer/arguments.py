"""`GRPOConfig`: TRL's argument names, where the meaning is the same, as a config of Tora."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tora.errors import ConfigError, nearest

DEFAULTS: dict[str, Any] = {
    "output_dir": "outputs/GRPO",
    "run_name": None,
    "max_steps": -1,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "max_prompt_length": 512,
    "max_completion_length": 256,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "learning_rate": 1e-6,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "beta": 0.0,
    "epsilon": 0.2,
    "epsilon_high": None,
    "loss_type": "dapo",
    "scale_rewards": True,
    "num_iterations": 1,
    "steps_per_generation": 1,
    "mask_truncated_completions": False,
    "reward_weights": None,
    "chat_template_kwargs": None,
    "max_tool_calling_iterations": None,
    "shuffle_dataset": True,
    "seed": 42,
    "bf16": True,
    "gradient_checkpointing": False,
    "use_vllm": False,
    "vllm_gpu_memory_utilization": None,
    "torch_compile": False,
    "eval_strategy": "no",
    "eval_steps": None,
    "eval_on_start": False,
    "save_steps": 500,
    "save_total_limit": None,
    "log_completions": False,
    "logging_steps": 10,
    "report_to": "none",
    "push_to_hub": False,
    "hub_model_id": None,
    "hub_strategy": "every_save",
    "hub_private_repo": None,
    "use_cpu": False,
    "tora": None,
}
"""TRL's names with the values that they have by default here. `tora`: keys of Tora's own config, dotted, that replace
what the others set: `{"async_rl": True, "rollout.num_workers": 2}`."""
NO_EFFECT = frozenset(
    {
        "logging_strategy", "logging_first_step", "save_strategy", "remove_unused_columns", "disable_tqdm", "log_level",
        "gradient_checkpointing_kwargs", "dataloader_num_workers", "dataloader_pin_memory", "vllm_mode", "optim",
        "per_device_eval_batch_size", "num_completions_to_print", "ddp_find_unused_parameters", "label_names",
        "overwrite_output_dir", "do_train", "do_eval", "fp16", "vllm_enable_sleep_mode",
    }
)  # fmt: skip
"""TRL's names that change nothing about what is trained here, and are accepted."""
_LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_normalization": "sequence"},
    "bnpo": {"loss_normalization": "token"},
    "dapo": {"loss_normalization": "token"},
    "dr_grpo": {"loss_normalization": "constant", "loss": "learner.loss.DrGRPOLoss"},
}
_SCHEDULES = {
    "linear": "transformers.get_linear_schedule_with_warmup",
    "cosine": "transformers.get_cosine_schedule_with_warmup",
    "constant": "transformers.get_constant_schedule_with_warmup",
    "constant_with_warmup": "transformers.get_constant_schedule_with_warmup",
}
_LOGGERS = {
    "wandb": "torchtune.training.metric_logging.WandBLogger",
    "tensorboard": "torchtune.training.metric_logging.TensorBoardLogger",
    "mlflow": "tora.reporting.mlflow.MLflowLogger",
    "trackio": "tora.reporting.trackio.TrackioLogger",
}


class GRPOConfig:
    """The arguments of a run, by the names of TRL's `GRPOConfig`; see `DEFAULTS` for all of them.

    Raises ConfigError for a name that Tora does not have, with the nearest one.
    """

    def __init__(self, output_dir: str = DEFAULTS["output_dir"], **arguments: Any) -> None:
        for name in arguments:
            if name not in DEFAULTS and name not in NO_EFFECT:
                raise ConfigError(f"GRPOConfig has no argument {name}{nearest(name, DEFAULTS)}")
        values = {**DEFAULTS, **{name: value for name, value in arguments.items() if name in DEFAULTS}}
        self.__dict__.update(values, output_dir=output_dir)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"GRPOConfig has no argument {name}{nearest(name, DEFAULTS)}")

    def __repr__(self) -> str:
        changed = {name: value for name, value in self.__dict__.items() if value != DEFAULTS.get(name)}
        return f"GRPOConfig({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    @property
    def prompts_per_step(self) -> int:
        """In TRL a batch counts completions. Raises ConfigError unless they are whole groups."""
        completions = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if completions % self.num_generations:
            raise ConfigError(
                f"per_device_train_batch_size * gradient_accumulation_steps is {completions}, which must be a multiple "
                f"of num_generations={self.num_generations}"
            )
        return completions // self.num_generations

    def steps(self, num_rows: int) -> int:
        """`max_steps`, or as many as the epochs need."""
        if self.max_steps > 0:
            return self.max_steps
        return max(1, int(self.num_train_epochs * num_rows / self.prompts_per_step))

    def tree(self, num_rows: int) -> dict[str, Any]:
        """All keys of the config except model, data and rewards. Raises ConfigError for a value that is not known."""
        loss = dict(_known(_LOSSES, "loss_type", self.loss_type))
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        component = loss.pop("loss", "learner.loss.GRPOLoss")
        return {
            "name": self.run_name or str(self.output_dir).rstrip("/").rpartition("/")[2],
            "output_dir": str(self.output_dir),
            "seed": self.seed,
            "dtype": "bf16" if self.bf16 else "fp32",
            **({"device": "cpu"} if self.use_cpu else {}),
            "compile": self.torch_compile,
            "activation_checkpointing": "full" if self.gradient_checkpointing else "none",
            "num_steps": self.steps(num_rows),
            "batch_size": self.prompts_per_step,
            "grpo_samples": self.num_generations,
            **({} if self.max_prompt_length is None else {"max_prompt_tokens": self.max_prompt_length}),
            "max_generated_tokens": self.max_completion_length,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k or 0,
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty,
            "ppo_epochs": self.num_iterations,
            "num_mini_batches": self.steps_per_generation,
            "mask_truncated": self.mask_truncated_completions,
            "normalize_advantages": self.scale_rewards not in (False, "none"),
            "clip_grad_norm": self.max_grad_norm or None,
            "chat_template_kwargs": self.chat_template_kwargs,
            "max_tool_calling_iterations": self.max_tool_calling_iterations,
            "shuffle": self.shuffle_dataset,
            **loss,
            "loss": {"_component_": component, "clip_low": self.epsilon, "clip_high": high, "kl_coeff": self.beta},
            "optimizer": {
                "_component_": "torch.optim.AdamW",
                "lr": self.learning_rate,
                "betas": [self.adam_beta1, self.adam_beta2],
                "eps": self.adam_epsilon,
                "weight_decay": self.weight_decay,
            },
            "lr_scheduler": {
                "_component_": _known(_SCHEDULES, "lr_scheduler_type", self.lr_scheduler_type),
                "num_warmup_steps": self.warmup_steps,
            },
            "rollout": {
                "engine": "vllm" if self.use_vllm else "torch",
                "gpu_memory_utilization": self.vllm_gpu_memory_utilization,
            },
            "checkpoint": {"every": self.save_steps, "keep": self.save_total_limit or 1_000_000},
            "log_completions": self.logging_steps if self.log_completions else 10,
            "push_to_hub": self.push_to_hub,
            "hub_model_id": self.hub_model_id if self.push_to_hub else None,
            "hub_strategy": self.hub_strategy,
            "hub_private_repo": bool(self.hub_private_repo),
            "metric_logger": [{"_component_": name} for name in self._loggers()],
        }

    def _loggers(self) -> list[str]:
        asked = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])
        return [_known(_LOGGERS, "report_to", name) for name in asked if name not in ("none", "all")]


def _known(table: Mapping[str, Any], name: str, value: Any) -> Any:
    if value not in table:
        raise ConfigError(f"{name}={value} is not one of {', '.join(table)}{nearest(str(value), table)}")
    return table[value]


def model_tree(model: Any, peft_config: Any) -> dict[str, Any]:
    """The section `model`. `model`: a folder or a name on the hub. `peft_config`: a `peft.LoraConfig`; None trains all
    weights, as in TRL. Raises ConfigError for a model object, and for what Tora's adapters do not have."""
    if not isinstance(model, str) and not hasattr(model, "__fspath__"):
        raise ConfigError(
            f"model is a {type(model).__name__}, expected a folder or a name on the hub: Tora loads the weights itself"
        )
    path = str(model)
    if peft_config is None:
        return {"path": path, "lora_type": "full"}

    def value(name: str) -> Any:
        return getattr(peft_config, name, None)

    if str(getattr(value("peft_type"), "value", value("peft_type"))) != "LORA":
        raise ConfigError(f"peft_config is a {type(peft_config).__name__}, expected a peft.LoraConfig")
    for name in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "exclude_modules"):
        if value(name):
            raise ConfigError(f"peft_config has {name}, which a new adapter of Tora does not have")
    targets = value("target_modules")
    return {
        "path": path,
        "lora_type": "dora_cache" if value("use_dora") else "lora",
        "lora_rank": value("r"),
        "lora_alpha": float(value("lora_alpha")),
        "lora_dropout": float(value("lora_dropout") or 0),
        "use_rslora": bool(value("use_rslora")),
        **({} if not targets else {"lora_targets": targets if isinstance(targets, str) else sorted(targets)}),
    }
