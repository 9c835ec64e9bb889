"""What a run says before it starts."""

from __future__ import annotations

from pathlib import Path

import torch

from tora.config.schema import RunConfig
from tora.models.hub import named


def banner(cfg: RunConfig, *, step: int = 0) -> list[str]:
    """Lines: the model and what of it is trained, where it runs, the batch, the folder. `step`: from which the run
    goes on. `rollout.engine` must be resolved."""
    from learner.policy import empty_policy

    policy = empty_policy(cfg, torch.device("cpu"))
    total = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    model, device = cfg.model, _device(cfg)
    kind = "all weights" if model.lora_type == "full" else f"{model.lora_type} of rank {model.lora_rank}"
    base = "NF4" if model.quantize_base else cfg.dtype
    name = Path(named(model).path).name if Path(model.path).is_absolute() else model.path
    workers = f"{cfg.rollout.num_workers} worker{'s' if cfg.rollout.num_workers > 1 else ''}"
    if cfg.eval is not None and cfg.eval.num_workers:
        workers += f" and {cfg.eval.num_workers} for evaluations"
    where = f"{workers} on Ray" if cfg.async_rl else "in this process"
    ranks = f", {cfg.learner_ranks} ranks" if cfg.learner_ranks > 1 else ""
    groups, size = f"{cfg.batch_size} prompts x {cfg.grpo_samples} rollouts", cfg.batch_size * cfg.grpo_samples
    resumed = f", from step {step}" if step else ""
    return [
        f"model   {name}, {count(total)} parameters in {base}; {kind} trains {count(trained)} ({trained / total:.2%})",
        f"engine  {cfg.rollout.engine}, {where}; learner on {device}{ranks}",
        f"batch   {groups} = {size} a step; {cfg.num_steps} steps{resumed}",
        f"folder  {cfg.output_dir}",
    ]


def _device(cfg: RunConfig) -> str:
    if cfg.device == "cpu" or not torch.cuda.is_available():
        return "CPU"
    return torch.cuda.get_device_name()


def count(number: int) -> str:
    """Such as `463k` or `1.72B`."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
