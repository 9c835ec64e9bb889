"""Whole weights in vLLM against transformers in float32: text and vision, tied and untied, with and without biases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tiny import make_text_model, make_vl_model, picture

pytest.importorskip("vllm")

from peft_reference import TOLERANCE, Reference, VisionReference
from vllm_engines import LONG_PROMPT, request, start_engine

from actors.vllm_engine.engine import VLLMEngine
from actors.vllm_engine.weight_updates import WholeWeights
from tora.adapters.snapshot import pack
from tora.errors import SyncError
from tora.models.load import shard_files, stream_tensors
from tora.types import PolicySnapshot, SampleRequest, Sampling

SMALL, WIDE = picture(64, 64), picture(160, 96, seed=1)
_FAMILIES: dict[str, Callable[[Path, int], Path]] = {
    "qwen3, tied": lambda folder, seed: make_text_model(folder, "qwen3", tied=True, seed=seed),
    "qwen2, untied, biases": lambda folder, seed: make_text_model(folder, "qwen2", tied=False, seed=seed),
    "qwen3_vl": lambda folder, seed: make_vl_model(folder, seed=seed),
}


@dataclass
class Served:
    engine: VLLMEngine
    references: list[Reference]
    """Models of the same shape. The engine was started from the first."""
    requests: list[SampleRequest]

    def snapshot(self, version: int, number: int) -> PolicySnapshot:
        (file,) = shard_files(self.references[number].folder)
        return pack(version, dict(stream_tensors(file)))

    def check(self, version: int, number: int) -> None:
        for asked, completions in zip(self.requests, self.engine.generate(self.requests), strict=True):
            for completion in completions:
                assert (completion.versions == version).all()
                assert self.references[number].error("base", 0, asked, completion) < TOLERANCE


@pytest.fixture(scope="module", params=_FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    make = _FAMILIES[request.param]
    folders = [make(tmp_path_factory.mktemp("model"), seed) for seed in range(3)]
    engine = start_engine(folders[0], update=WholeWeights())
    yield Served(engine, *(_vision(folders) if request.param == "qwen3_vl" else _text(folders)))
    engine.close()


def _text(folders: list[Path]) -> tuple[list[Reference], list[SampleRequest]]:
    return [Reference(folder) for folder in folders], [request(), request(LONG_PROMPT)]


def _vision(folders: list[Path]) -> tuple[list[Reference], list[SampleRequest]]:
    references = [VisionReference(folder, tower=False) for folder in folders]
    requests = []
    for images in ((), (SMALL,), (WIDE, SMALL)):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": "is it?"}]
        ids = references[0].processor.encode([{"role": "user", "content": content}], images)
        requests.append(SampleRequest(ids, 2, 3, Sampling(8), images))
    return list(references), requests


def test_successive_syncs_serve_the_weights_that_were_sent(served: Served) -> None:
    """The prompts stay the same, so using blocks cached under earlier weights would be noticed."""
    for version, number in enumerate([0, 1, 2, 1]):
        sent = served.snapshot(version, number)
        report = served.engine.install(sent)
        assert (report.version, report.nbytes, report.sha256) == (version, sent.nbytes, sent.sha256)
        assert report.num_modules == len({entry.name.rpartition(".")[0] for entry in sent.entries})
        served.check(version, number)


def test_broken_weights_are_rejected_whole(served: Served) -> None:
    good = served.snapshot(7, 1)
    served.engine.install(good)
    (file,) = shard_files(served.references[2].folder)
    tensors = dict(stream_tensors(file))
    some = next(name for name in tensors if name.endswith("k_proj.weight"))
    damaged = good.data.copy()
    damaged[100] ^= 1
    for broken, words in (
        (pack(8, {name: t for name, t in tensors.items() if name != some}), f"lacks {some}"),
        (pack(8, {**tensors, some: tensors[some][:-1]}), "is not a tensor of the engine's model"),
        (pack(8, {**tensors, "model.more.weight": torch.zeros(2)}), "model.more.weight of shape"),
        (replace(good, version=8, data=damaged), "damaged in transit"),
    ):
        with pytest.raises(SyncError, match=words):
            served.engine.install(broken)
    served.check(7, 1)
