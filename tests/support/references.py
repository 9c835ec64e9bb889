"""What the KL term compares with, seen by a test: the reference's log-probs from the learner, and from PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from adapters import shake
from peft import PeftModel
from transformers import AutoModelForCausalLM, Qwen3VLForConditionalGeneration
from vision_inputs import hugging_face_inputs

from learner.learner import Learner
from learner.loss import GRPOLoss, LossInputs
from tora.config.schema import RunConfig
from tora.models.vision.processor import ImageProcessor
from tora.types import Group, TrainBatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SEEN: list[LossInputs] = []
"""The inputs of every call of `Seen` since the list was last cleared."""


class Seen(GRPOLoss):
    """GRPO that keeps its inputs."""

    def __call__(self, x: LossInputs) -> Any:
        SEEN.append(x)
        return super().__call__(x)


KL: dict[str, Any] = {"_component_": "references.Seen", "kl_coeff": 0.05}


def write_adapter(cfg: RunConfig, folder: Path) -> Path:
    """The folder of an adapter whose B is not zero."""
    learner = Learner(cfg)
    shake(learner.model)
    learner.export(folder)
    return folder


def seen_reference(batch: TrainBatch, groups: list[Group]) -> torch.Tensor:
    """The reference's log-probs in the newest call of the loss, [N], in the order of `groups`.

    `batch` holds the groups in one micro-batch, in an order of its own.
    """
    (micro,), ref_N = batch.micro_batches, SEEN[-1].ref_logprobs_N
    assert ref_N is not None
    found = {}
    for b in range(len(micro.lengths_B)):
        is_mine_N = torch.from_numpy(micro.sequence_N == b)
        found[tuple(torch.from_numpy(micro.targets_N)[is_mine_N].tolist())] = ref_N[is_mine_N]
    return torch.cat([found[tuple(rollout.token_ids.tolist())] for group in groups for rollout in group.rollouts])


@torch.no_grad()
def peft_logprobs(base: Path, adapter: Path | None, groups: list[Group], dtype: str) -> torch.Tensor:
    """Of all response tokens in order, [N] float32, by transformers and PEFT, one sequence at a time."""
    vision = "vision_config" in (base / "config.json").read_text()
    kind: Any = Qwen3VLForConditionalGeneration if vision else AutoModelForCausalLM
    model = kind.from_pretrained(base, dtype=DTYPES[dtype])
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    found = []
    for group in groups:
        for rollout in group.rollouts:
            ids = torch.tensor([*group.prompt.token_ids, *rollout.token_ids.tolist()])[None]
            inputs = (
                hugging_face_inputs(ImageProcessor(base), ids, group.prompt.images) if vision else {"input_ids": ids}
            )
            logits = model.eval()(**inputs).logits[0, len(group.prompt.token_ids) - 1 : -1].float()
            found.append(logits.log_softmax(1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0])
    return torch.cat(found)
