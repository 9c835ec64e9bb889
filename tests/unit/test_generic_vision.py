"""Models of transformers that take images, with our attention: against transformers and PEFT."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import CPU
from tiny import picture
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.smolvlm import processing_smolvlm as smolvlm
from vision_inputs import hugging_face_inputs
from vision_learners import LOSS, check_gradients, vl_config

from actors.torch_engine.engine import TorchEngine
from tora.adapters.inject import snapshot
from tora.batching.packing import distinct
from tora.bench.vision_families import VISION_FAMILIES, write_vision_family
from tora.config.schema import RolloutConfig
from tora.errors import ConfigError
from tora.launch.servable import vllm_gap, with_served_model
from tora.models.attention import PackedAttention
from tora.models.generic_build import build_generic
from tora.models.load import load_decoder
from tora.models.proof import prove
from tora.models.shared_prefix import SharedPrefixAttention
from tora.models.vision.generic import GenericVision
from tora.models.vision.inputs import image_inputs
from tora.models.vision.processor import ImageProcessor
from tora.types import SampleRequest, Sampling

SHOWN: list[list[tuple[int, int]]] = [[(40, 24)], [], [(28, 60), (40, 24)]]
"""Widths and heights of the images of each prompt; two prompts share one."""
REWARDS = [{"_component_": "tora.rewards.format"}]
NUM_TAILS = (2, 1, 1)
"""Completions of each prompt."""


@dataclass(frozen=True)
class Tiny:
    """A family's model as transformers has it and as ours, with prompts and their completions."""

    folder: Path
    theirs: Any
    ours: GenericVision
    processor: ImageProcessor
    prompts: list[tuple[tuple[int, ...], tuple[bytes, ...]]]
    tails: list[tuple[int, list[int]]]
    """The number of its prompt, and its tokens."""


@cache
def _made(folder: Path, name: str) -> Tiny:
    write_vision_family(folder, name)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ours = load_decoder(folder, dtype=torch.float32, device=CPU)
    assert isinstance(ours, GenericVision)
    processor, rng = ImageProcessor(folder), np.random.default_rng(0)
    prompts = []
    for number, sizes in enumerate(SHOWN):
        images = tuple(picture(*size, seed=size[0]) for size in sizes)
        text = [{"type": "text", "text": f" and {number}"}]
        parts = [part for _ in images for part in ({"type": "image"}, *text)] or text
        prompts.append((processor.encode([{"role": "user", "content": parts}], images), images))
    tails = [(n, rng.integers(60, 300, size=7 + n).tolist()) for n, count in enumerate(NUM_TAILS) for _ in range(count)]
    return Tiny(folder, theirs, ours, processor, prompts, tails)


@pytest.fixture(scope="module", params=VISION_FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    if request.param == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("its processor needs the package num2words")
    return _made(tmp_path_factory.getbasetemp() / request.param, request.param)


def logits_of_transformers(t: Tiny) -> list[torch.Tensor]:
    """Of each prompt and completion, by the processor's own inputs and the model's own forward."""
    found = []
    for number, tail in t.tails:
        ids, images = t.prompts[number]
        with torch.no_grad():
            found.append(t.theirs(**hugging_face_inputs(t.processor, torch.tensor([[*ids, *tail]]), images)).logits[0])
    return found


def ours_packed(t: Tiny, *, share: bool) -> list[torch.Tensor]:
    """Logits of each prompt and completion; with `share`, of each completion only."""
    lengths = [len(ids) for ids, _ in t.prompts]
    if share:
        pieces = [*(list(ids) for ids, _ in t.prompts), *(tail for _, tail in t.tails)]
        starts = [0] * len(lengths) + [lengths[n] for n, _ in t.tails]
        document = [*range(len(lengths)), *(n for n, _ in t.tails)]
        branch = [-1] * len(lengths) + [0, 1, 0, 0]
        given = [True] * len(lengths) + [False] * len(t.tails)
        shown = [image for _, images in t.prompts for image in images]
        attend: Any = SharedPrefixAttention(
            torch.tensor(lengths), torch.tensor([len(x) for _, x in t.tails]), torch.tensor([n for n, _ in t.tails])
        )
    else:
        pieces = [[*t.prompts[n][0], *tail] for n, tail in t.tails]
        starts, document, branch = [0] * len(pieces), range(len(pieces)), [-1] * len(pieces)
        given, shown = [True] * len(pieces), [image for n, _ in t.tails for image in t.prompts[n][1]]
        attend = PackedAttention(torch.tensor([len(p) for p in pieces]))
    sizes = [len(piece) for piece in pieces]
    images, image_I = distinct(shown)
    inputs, positions = image_inputs(
        t.ours,
        t.processor.pixels(images),
        tokens_T=np.concatenate(pieces),
        positions_T=np.concatenate([start + np.arange(n) for start, n in zip(starts, sizes, strict=True)]),
        document_T=np.repeat(document, sizes),
        given_T=np.repeat(given, sizes),
        image_I=image_I,
        device=CPU,
        branch_T=np.repeat(branch, sizes),
    )
    with torch.no_grad():
        hidden = t.ours(
            torch.tensor(np.concatenate(pieces))[None],
            positions=torch.from_numpy(positions).unsqueeze(-2),
            attend=attend,
            images=inputs,
        )
        logits = t.ours.logits(hidden[0]).split(sizes)
    return list(logits[len(lengths) :] if share else logits)


def test_packed_logits_equal_those_of_transformers(tiny: Tiny) -> None:
    for ours, theirs in zip(ours_packed(tiny, share=False), logits_of_transformers(tiny), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_logits_after_shared_prompts_equal_those_of_transformers(tiny: Tiny) -> None:
    expected = logits_of_transformers(tiny)
    for ours, theirs in zip(ours_packed(tiny, share=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs[-len(ours) :], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("lora_type", "train_vision"),
    [("lora", "none"), ("dora_cache", "lora"), pytest.param("dora", "full", marks=pytest.mark.slow)],
)
def test_an_exported_policy_has_the_same_gradients_in_peft(
    tmp_path: Path, tiny: Tiny, lora_type: str, train_vision: str
) -> None:
    check_gradients(vl_config(tiny.folder, lora_type, train_vision, loss=LOSS), tmp_path)


def test_the_torch_engine_samples_from_the_learners_policy(tiny: Tiny) -> None:
    """Prompts with no, one and two images; a cache that outgrows the windows."""
    engine = TorchEngine(tiny.ours, device=CPU, shared=True, max_rows=100, processor=lambda: tiny.processor)
    engine.install(snapshot(tiny.ours, 1))
    requests = [SampleRequest(ids, 2, 7, Sampling(24), images) for ids, images in tiny.prompts]
    compared = 0
    for request, completions in zip(requests, engine.generate(requests), strict=True):
        for completion in completions:
            tail = completion.token_ids.tolist()
            if tiny.ours.image_token in tail:  # transformers would expect one more image
                continue
            whole = torch.tensor([[*request.token_ids, *tail]])
            with torch.no_grad():
                logits = tiny.theirs(**hugging_face_inputs(tiny.processor, whole, request.images)).logits[0]
            logprobs = logits[len(request.token_ids) - 1 : -1].log_softmax(1)
            expected = logprobs.gather(1, torch.tensor(tail)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)
            compared += 1
    assert compared >= 4


def test_an_image_changes_what_follows_it(tiny: Tiny) -> None:
    """Otherwise the comparisons above would prove little."""
    (ids, _), *_ = tiny.prompts
    texts = []
    for seed in (1, 2):
        inputs = hugging_face_inputs(tiny.processor, torch.tensor([ids]), [picture(40, 24, seed=seed)])
        with torch.no_grad():
            texts.append(tiny.theirs(**inputs).logits[0, -1])
    assert (texts[0] - texts[1]).abs().max() > 0.02


def test_what_vllm_cannot_serve_is_refused_before_anything_is_loaded(tiny: Tiny) -> None:
    cfg = vl_config(tiny.folder, "lora", "lora", rollout=RolloutConfig(engine="vllm"), rewards=REWARDS)
    with pytest.raises(
        ConfigError, match=r"no adapter in the vision tower of a '\w+' model .*: it needs rollout.engine"
    ):
        with_served_model(cfg, "vllm")
    assert with_served_model(cfg, "auto").rollout.engine == "torch"
    gap = vllm_gap(vl_config(tiny.folder, "lora", "none"))
    refused = tiny.ours.hf.config.model_type in ("gemma3", "qwen3_5") and not torch.cuda.is_available()
    assert (gap is not None) == refused


def test_a_package_that_a_processor_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smolvlm, "num2words", str)
    write_vision_family(tmp_path, "smolvlm")
    monkeypatch.setattr(smolvlm, "num2words", None)
    with pytest.raises(ConfigError, match=r"^the processor of '.*' cannot be loaded: .*pip install num2words`\.$"):
        ImageProcessor(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "SmolVLMProcessor"}))
    with pytest.raises(ConfigError, match=r"^the processor of '.*' cannot be loaded: .* image processor"):
        ImageProcessor(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("llama4", "layers of type 'chunked_attention'"),
        ("gemma3n", "its layers share keys and values"),
        ("florence2", "it has an encoder"),
        ("kosmos-2", "its decoder has no `layers`"),
        ("deepseek_vl", "does not let its attention be replaced"),
        ("idefics", "no attribute 'image_token_id'"),
        ("mllama", "no attribute 'tie_word_embeddings'"),
        ("qwen2_5_omni_thinker", "no attribute 'thinker'"),
    ],
)
def test_a_model_with_images_that_cannot_be_trained_is_refused_by_reason(model_type: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"cannot be trained: .*{words}"):
        build_generic(AutoConfig.for_model(model_type))


def test_a_forward_that_expects_something_else_is_refused_by_what_it_raised(tiny: Tiny) -> None:
    decoder = tiny.ours.hf.get_decoder()
    plain = decoder.forward

    def odd(*args: Any, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        if "tora_attend" in kwargs:
            raise TypeError("it wants ids")
        return plain(*args, inputs_embeds=inputs_embeds, **kwargs)

    decoder.forward = odd
    try:
        with pytest.raises(ConfigError, match=r"its forward raised TypeError for packed documents: it wants ids"):
            prove(tiny.ours, CPU, lambda: tiny.processor)
    finally:
        decoder.forward = plain
    prove(tiny.ours, CPU, lambda: tiny.processor)
