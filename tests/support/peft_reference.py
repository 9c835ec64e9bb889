"""Adapters in transformers and PEFT: the reference for vLLM's log-probs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from tiny import LINEARS
from vision_inputs import hugging_face_inputs

from actors.torch_engine.sampling import log_distribution, log_policy
from tora.adapters.snapshot import GAIN, LORA_A, LORA_B, pack
from tora.models.vision.processor import ImageProcessor
from tora.types import Completion, PolicySnapshot, SampleRequest

RANK = 4
TOLERANCE = 1e-4
Tensors = dict[str, torch.Tensor]


class Reference:
    """The base model and PEFT adapters on it, in transformers."""

    unread: frozenset[int] = frozenset()
    """Tokens that a completion may have, but the reference cannot read back."""

    def __init__(self, folder: Path, targets: str | list[str] | None = None) -> None:
        """`targets`: PEFT's `target_modules`; None for the decoder's linear layers."""
        self.folder, self._targets = folder, targets or list(LINEARS)
        self._models: dict[tuple[str, int], Any] = {}

    def model(self, kind: str, seed: int = 0) -> Any:
        """`kind`: base, lora, dora, or `patterns`, LoRA whose layers differ in rank and alpha. Each seed is a different
        adapter."""
        if (kind, seed) not in self._models:
            base = self._load()
            adapted = base if kind == "base" else _with_adapter(base, kind, seed, self._targets)
            self._models[kind, seed] = adapted
        return self._models[kind, seed]

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def logits(self, model: Any, ids: list[int], images: tuple[bytes, ...]) -> torch.Tensor:
        """[L, V]."""
        assert not images, "see VisionReference"
        return model(input_ids=torch.tensor([ids])).logits[0]

    @torch.no_grad()
    def tensors(self, kind: str, seed: int) -> Tensors:
        """In the wire format: scaling folded into B, and the magnitude converted to a gain."""
        from peft.tuners.lora import LoraLayer

        wire: Tensors = {}
        for name, layer in self.model(kind, seed).named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            name = name.removeprefix("base_model.model.")
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight * layer.scaling["default"]
            wire[name + LORA_A], wire[name + LORA_B] = a.clone(), b.clone()
            if kind == "dora":
                norm = (layer.get_base_layer().weight + b @ a).norm(dim=1)
                wire[name + GAIN] = layer.lora_magnitude_vector["default"].weight / norm
        return wire

    def snapshot(self, version: int, kind: str, seed: int) -> PolicySnapshot:
        return pack(version, self.tensors(kind, seed))

    def error(self, kind: str, seed: int, request: SampleRequest, completion: Completion) -> float:
        """Largest log-prob difference over the sampled tokens."""
        return float(self.errors(kind, seed, request, completion).max())

    @torch.no_grad()
    def errors(self, kind: str, seed: int, request: SampleRequest, completion: Completion) -> torch.Tensor:
        """[L]: difference of each sampled token's log-prob, under the policy or under the distribution drawn from,
        whichever is larger; L: up to the first that the reference takes no further."""
        start, ids = len(request.token_ids), completion.token_ids.tolist()
        end = next((at + 1 for at, token in enumerate(ids) if token in self.unread), len(ids))
        logits = self.logits(self.model(kind, seed), [*request.token_ids, *ids[: end - 1]], request.images)
        logits, token_L1 = logits[start - 1 :], torch.from_numpy(completion.token_ids)[:end, None]
        policy_L = log_policy(logits, request.sampling.temperature).gather(1, token_L1)[:, 0]
        drawn_L = log_distribution(logits, request.sampling).gather(1, token_L1)[:, 0]
        return torch.maximum(
            (policy_L - torch.from_numpy(completion.logprobs[:end])).abs(),
            (drawn_L - torch.from_numpy(completion.sampling_logprobs[:end])).abs(),
        )


class VisionReference(Reference):
    """A vision model in transformers, with adapters in its decoder and, with `tower`, in its vision part."""

    def __init__(self, folder: Path, *, tower: bool, max_pixels: int | None = None) -> None:
        decoder = rf".*language_model\..*\.({'|'.join(LINEARS)})"
        super().__init__(folder, rf"{decoder}|.*visual\..*\.(qkv|attn\.proj|linear_fc[12])" if tower else decoder)
        self.processor = ImageProcessor(folder, max_pixels)
        config = json.loads((folder / "config.json").read_text())
        # transformers would look for the features of an image that is not there
        self.unread = frozenset({config["image_token_id"], config["video_token_id"]})

    def _load(self) -> Any:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()

    def logits(self, model: Any, ids: list[int], images: tuple[bytes, ...]) -> torch.Tensor:
        return model(**hugging_face_inputs(self.processor, torch.tensor([ids]), images)).logits[0]


def _with_adapter(base: Any, kind: str, seed: int, targets: str | list[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    patterns: Any = {"rank_pattern": {"v_proj": 7, "layers.0.mlp.up_proj": 1}, "alpha_pattern": {"o_proj": RANK}}
    own = patterns if kind == "patterns" else {"use_dora": kind == "dora"}
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, **own)
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_A" in name:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
            elif "lora_B" in name:
                parameter.copy_(0.3 * noise / math.sqrt(RANK))
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise)
    return model
