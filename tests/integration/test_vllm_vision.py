"""vLLM with images against teacher-forced transformers and PEFT in float32, on a tiny random Qwen3-VL."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_reference import TOLERANCE, VisionReference
from stepped import StepGate
from tiny import LINEARS, make_text_model, make_vl_model, picture
from vllm_engines import start_engine, wait_until

pytest.importorskip("vllm")

from actors.continuation import generate_in_parts
from actors.torch_engine.sampling import log_distribution
from actors.vllm_engine.engine import VLLMEngine
from actors.vllm_engine.images import places
from actors.vllm_engine.weight_updates import InFlight
from tora.adapters.snapshot import pack
from tora.errors import SyncError
from tora.models.attention import PackedAttention
from tora.models.load import load_decoder
from tora.models.vision.inputs import image_inputs
from tora.models.vision.processor import ImageProcessor
from tora.models.vision.qwen3_vl import Qwen3VL
from tora.types import Completion, LogprobRequest, SampleRequest, Sampling

SMALL, WIDE = picture(64, 64), picture(160, 96, seed=1)
DECODER_MODULES, TOWER_MODULES = 3 * len(LINEARS), 3 * 4 + 3 * 2
CPU = torch.device("cpu")


def ask(
    reference: VisionReference, *images: bytes, text: str = "is it?", max_tokens: int = 12, seed: int = 1, **kw: float
) -> SampleRequest:
    content = [part for _ in images for part in ({"type": "image"}, {"type": "text", "text": text})]
    messages = [{"role": "user", "content": content or text}]
    ids = reference.processor.encode(messages, images)
    return SampleRequest(ids, 2, seed, Sampling(max_tokens, **kw), images)


class Served:
    def __init__(self, engine: VLLMEngine, reference: VisionReference, tower: bool) -> None:
        self.engine, self.reference, self.tower, self.version = engine, reference, tower, 0

    def install(self, kind: str, seed: int, reference: VisionReference | None = None) -> int:
        """Returns the number of modules updated."""
        self.version += 1
        return self.engine.install((reference or self.reference).snapshot(self.version, kind, seed)).num_modules

    def check(self, kind: str, seed: int, *requests: SampleRequest, reference: VisionReference | None = None) -> None:
        for r, group in zip(requests, self.engine.generate(requests), strict=True):
            for completion in group:
                assert (completion.versions == self.version).all()
                assert (reference or self.reference).error(kind, seed, r, completion) < TOLERANCE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vl_model(tmp_path_factory.mktemp("vl"))


@pytest.fixture(scope="module", params=["decoder", "tower"])
def served(request: pytest.FixtureRequest, folder: Path) -> Iterator[Served]:
    tower = request.param == "tower"
    max_pixels = None if tower else 96 * 96  # so that WIDE is scaled down
    engine = start_engine(folder, adapt_vision=tower, max_pixels=max_pixels)
    yield Served(engine, VisionReference(folder, tower=tower, max_pixels=max_pixels), tower)
    engine.close()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_logprobs_after_a_sync_are_those_of_transformers_and_peft(served: Served, kind: str) -> None:
    requests = [ask(served.reference, *images) for images in ((), (SMALL,), (WIDE, SMALL), (SMALL, WIDE))]
    for seed in (1, 2):
        assert served.install(kind, seed) == DECODER_MODULES + (TOWER_MODULES if served.tower else 0)
        served.check(kind, seed, *requests)
    (completion, *_) = served.engine.generate([requests[1]])[0]
    assert served.reference.error(kind, 1, requests[1], completion) > 0.05, "the two adapters differ visibly"
    unseen = replace(requests[1], images=(picture(64, 64, seed=9),))
    assert served.reference.error(kind, 2, unseen, completion) > 0.05, "the image matters"


def test_sampling_with_truncation_and_greedy(served: Served) -> None:
    served.install("dora", 1)
    cold = ask(served.reference, WIDE, temperature=0.7, top_p=0.8)
    served.check("dora", 1, cold, ask(served.reference, SMALL, temperature=0.0))


def test_engine_and_learner_see_the_same_pixels(served: Served) -> None:
    request = ask(served.reference, WIDE, SMALL)
    made = served.engine._inputs(request.token_ids, request.images)
    theirs = [item["pixel_values"].data.numpy() for item in made["mm_kwargs"]["image"]]
    ours = served.reference.processor.pixels(request.images)
    np.testing.assert_array_equal(np.concatenate(theirs), ours.patches_ND)
    grids = np.stack([item["image_grid_thw"].data.numpy() for item in made["mm_kwargs"]["image"]])
    np.testing.assert_array_equal(grids, ours.grid_IT)
    assert ours.grid_IT.tolist() == [[1, 6, 10] if served.tower else [1, 4, 6], [1, 4, 4]]


def test_caches_are_not_shared_between_versions(served: Served) -> None:
    """The same image under several versions, whose towers and decoders give different outputs."""
    request = ask(served.reference, WIDE, text="tell me at length what it is that you see")
    for kind, seed in (("lora", 1), ("lora", 2), ("dora", 1), ("lora", 1)):
        served.install(kind, seed)
        for _ in range(2):  # cold, then from the cache
            served.check(kind, seed, request)
    served.version -= 1  # a resumed run reaches the same version number again
    served.install("dora", 2)
    served.check("dora", 2, request)


def test_a_tower_that_is_not_served_is_refused(served: Served) -> None:
    other = VisionReference(served.reference.folder, tower=not served.tower)
    if not served.tower:
        with pytest.raises(SyncError, match=r"visual.* matches no LoRA layer"):
            served.install("lora", 1, other)
    else:  # conversely, absent modules run as the base
        assert served.install("lora", 1, other) == DECODER_MODULES
        served.check("lora", 1, ask(served.reference, WIDE), reference=other)


def test_requests_that_do_not_fit_their_images_are_refused(served: Served) -> None:
    served.install("lora", 1)
    request = ask(served.reference, SMALL)
    for images in ((WIDE,), (SMALL, SMALL)):
        with pytest.raises(ValueError, match=r"has 4 image placeholders, and vLLM makes (6|8|15) features"):
            served.engine.generate([replace(request, images=images)])
    with pytest.raises(ValueError, match="a run of image placeholders in a prompt is not as long"):
        served.engine.generate([replace(ask(served.reference, WIDE), images=(SMALL,))])
    served.check("lora", 1, request)


def test_scores_of_given_completions(served: Served) -> None:
    served.install("dora", 1)
    request = ask(served.reference, WIDE, SMALL)
    ((completion, _),) = served.engine.generate([request])
    given = LogprobRequest(request.token_ids, tuple(completion.token_ids.tolist()), request.images)
    for adapter, kind in ((True, "dora"), (False, "base")):
        (scores,) = served.engine.logprobs([given], adapter=adapter)
        scored = replace(completion, logprobs=scores, sampling_logprobs=scores)
        assert served.reference.error(kind, 1, request, scored) < TOLERANCE


def test_a_sampled_placeholder_is_an_ordinary_token(served: Served) -> None:
    """For the engine and the learner. Banning the token instead would change the distribution."""
    zero = {name: torch.zeros_like(t) for name, t in served.reference.tensors("lora", 1).items()}
    served.version += 1
    served.engine.install(pack(served.version, zero))
    model = load_decoder(served.reference.folder, dtype=torch.float32, device=CPU)
    assert isinstance(model, Qwen3VL)
    special = {model.image_token, model.video_token, model.image_token - 1, model.image_token - 2}
    for part in (None, 40):  # in one part, and in parts whose later prompts contain the placeholder
        hits = 0
        for seed in range(4):
            asked = replace(ask(served.reference, SMALL, max_tokens=100, temperature=2.0, seed=seed), num_samples=8)
            for completion in generate_in_parts(served.engine, [asked], part)[0]:
                if special & set(completion.token_ids[:40].tolist()):
                    hits += 1
                    assert _error_of_learner(model, served.reference.processor, asked, completion) < TOLERANCE
        assert hits > 3


def _error_of_learner(
    model: Qwen3VL, processor: ImageProcessor, request: SampleRequest, completion: Completion
) -> float:
    start, tokens_T = len(request.token_ids), np.concatenate([request.token_ids, completion.token_ids])
    inputs, positions_3T = image_inputs(
        model,
        processor.pixels(request.images),
        tokens_T=tokens_T,
        positions_T=np.arange(len(tokens_T)),
        document_T=np.zeros(len(tokens_T), np.int64),
        given_T=np.arange(len(tokens_T)) < start,
        image_I=np.arange(len(request.images)),
        device=CPU,
    )
    with torch.no_grad():
        logits = model(
            torch.from_numpy(tokens_T)[None],
            positions=torch.from_numpy(positions_3T)[:, None],
            attend=PackedAttention(torch.tensor([len(tokens_T)])),
            images=inputs,
            output_fn=lambda hidden: model.output(hidden[0]),
        )
    expected = log_distribution(logits[start - 1 : -1], request.sampling)
    logprobs = expected.gather(1, torch.from_numpy(completion.token_ids)[:, None])[:, 0]
    return float((logprobs - torch.from_numpy(completion.logprobs)).abs().max())


@pytest.mark.parametrize("recompute", [True, False])
def test_images_under_a_new_version_while_requests_run(folder: Path, recompute: bool) -> None:
    """With `recompute_kv`, later tokens come from the new tower and the new decoder."""
    gate = StepGate()
    engine = start_engine(folder, adapt_vision=True, update=InFlight(recompute_kv=recompute), gate=gate)
    reference = VisionReference(folder, tower=True)
    asked = replace(ask(reference, WIDE, max_tokens=60), num_samples=1)
    try:
        engine.install(reference.snapshot(1, "lora", 1))
        with ThreadPoolExecutor(3) as threads, gate.shut():
            running = threads.submit(engine.generate, [asked])
            gate.allow(20)
            gate.wait_for_engine()
            queued = threads.submit(engine.generate, [asked])
            wait_until(lambda: len(engine._commands) == 1)
            installing = threads.submit(engine.install, reference.snapshot(2, "dora", 2))
            wait_until(lambda: len(engine._commands) == 2)
            gate.open()
            installing.result(30)
            ((completion,),), ((neighbour,),) = running.result(30), queued.result(30)
            ((fresh,),) = engine.generate([asked])
        assert completion.versions.tolist() == [1] * 21 + [2] * 39
        assert reference.errors("lora", 1, asked, completion)[:21].max() < TOLERANCE
        assert (reference.errors("dora", 2, asked, completion)[21:].max() < TOLERANCE) == recompute
        for other in (neighbour, fresh):
            assert (other.versions == 2).all()
            assert reference.error("dora", 2, asked, other) < TOLERANCE
    finally:
        engine.close()


def test_text_models_take_no_images(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path, num_layers=1)
    with pytest.raises(ValueError, match="without a vision tower"):
        start_engine(folder, adapt_vision=True)


def test_places() -> None:
    ids = [1, 5, 5, 5, 2, 2, 5, 3, 5, 5]
    assert [(p.offset, p.length, p.is_embed) for p in places(ids, 5, [3, 1])] == [(1, 3, None), (6, 1, None)]
    (pieces,) = places(ids, 5, [4])
    assert (pieces.offset, pieces.length, pieces.get_num_embeds()) == (1, 6, 4)
    for counts, words in (([3, 4], "6 image placeholders, and vLLM makes 7"), ([2, 1], "not as long as"), ([2], "as")):
        with pytest.raises(ValueError, match=words):
            places(ids, 5, counts)
