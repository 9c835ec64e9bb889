"""A few steps of TRL's GRPOTrainer, for `tora.bench.trl`. Runs in TRL's own environment, without Tora."""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any


def main(settings: dict[str, Any]) -> list[float]:
    """Seconds of each step. `settings`: see `tora.bench.trl.Workload`, with `method` and `folder` beside it."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    torch.set_num_threads(settings["threads"])
    began = list[float]()

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            began.append(time.perf_counter())

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            began.append(time.perf_counter())

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        return [completion[0]["content"].count("e") / 10 for completion in completions]

    group = settings["group_size"]
    config = GRPOConfig(
        output_dir=settings["folder"],
        per_device_train_batch_size=settings["prompts"] * group,
        num_generations=group,
        max_completion_length=settings["new_tokens"],
        generation_kwargs={"min_new_tokens": settings["new_tokens"]},
        max_steps=settings["steps"],
        beta=settings["kl_coeff"],
        learning_rate=1e-5,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        model_init_kwargs={"dtype": "float32"},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    adapter = LoraConfig(r=settings["rank"], lora_alpha=16, target_modules="all-linear")
    trainer = GRPOTrainer(
        model=settings["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in settings["texts"]]),
        peft_config=adapter if settings["method"] == "lora" else None,
        callbacks=[Clock()],
    )
    trainer.train()
    return [b - a for a, b in itertools.pairwise(began)]


if __name__ == "__main__":
    seconds = main(json.loads(sys.argv[1]))
    print("SECONDS " + json.dumps(seconds))
