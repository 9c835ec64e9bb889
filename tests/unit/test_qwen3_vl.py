"""Qwen3-VL against transformers in float32: logits, positions and refused inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import CPU
from safetensors.torch import load_file
from tiny import LINEARS, make_vl_model, picture
from transformers import Qwen3VLForConditionalGeneration
from vision_inputs import hugging_face_inputs

from tora.models.attention import PackedAttention
from tora.models.load import load_decoder
from tora.models.quantize import NF4Tensor
from tora.models.shared_prefix import SharedPrefixAttention
from tora.models.vision.inputs import image_inputs
from tora.models.vision.processor import ImageProcessor
from tora.models.vision.qwen3_vl import FAMILY, ImageInputs, Qwen3VL

SIZES: list[list[tuple[int, int]]] = [[], [(96, 64)], [(64, 64), (128, 96)], [(32, 160), (96, 64)]]
"""Widths and heights of each prompt's images; two prompts share an image."""
TOLERANCE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-5}


class Sample:
    """A prompt with its images, and a tail of random tokens."""

    def __init__(self, processor: ImageProcessor, sizes: list[tuple[int, int]], number: int, tail: int = 9) -> None:
        self.images = [picture(*size, seed=size[0]) for size in sizes]
        parts = [part for i in range(len(sizes)) for part in ({"type": "image"}, {"type": "text", "text": f"is {i}?"})]
        content = [{"type": "text", "text": "What" * number}, *parts]
        self.prompt = list(processor.encode([{"role": "user", "content": content}], self.images))
        self.tail = np.random.default_rng(number).integers(10, 260, tail).tolist()

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.tail


@pytest.fixture(scope="module", params=["tied", "untied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Qwen3VL, Path]:
    folder = make_vl_model(tmp_path_factory.mktemp("vl"), tied=request.param == "tied")
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_decoder(folder, dtype=torch.float32, device=CPU)
    assert isinstance(ours, Qwen3VL)
    return theirs, ours, folder


@pytest.fixture(scope="module")
def samples(models: tuple[Any, Qwen3VL, Path]) -> list[Sample]:
    processor = ImageProcessor(models[2])
    return [Sample(processor, sizes, number) for number, sizes in enumerate(SIZES)]


def hugging_face(model: Any, folder: Path, samples: list[Sample], padding: str) -> list[torch.Tensor]:
    """Each sample's logits, from one padded batch."""
    longest = max(len(s.ids) for s in samples)
    ids, mask = torch.zeros(2, len(samples), longest, dtype=torch.long)
    for row, sample in enumerate(samples):
        place = slice(longest - len(sample.ids), None) if padding == "left" else slice(len(sample.ids))
        ids[row, place], mask[row, place] = torch.tensor(sample.ids), 1
    images = [image for sample in samples for image in sample.images]
    with torch.no_grad():
        logits = model(attention_mask=mask, **hugging_face_inputs(ImageProcessor(folder), ids, images)).logits
    return [logits[row][mask[row].bool()] for row in range(len(samples))]


def packed_inputs(model: Qwen3VL, folder: Path, samples: list[Sample]) -> tuple[ImageInputs, np.ndarray]:
    """Each distinct image goes through the tower once."""
    lengths = [len(s.ids) for s in samples]
    in_prompt = [np.arange(len(s.ids)) < len(s.prompt) for s in samples]
    shown = [image for s in samples for image in s.images]
    distinct = list(dict.fromkeys(shown))
    return image_inputs(
        model,
        ImageProcessor(folder).pixels(distinct),
        tokens_T=np.concatenate([s.ids for s in samples]),
        positions_T=np.concatenate([np.arange(n) for n in lengths]),
        document_T=np.repeat(np.arange(len(samples)), lengths),
        given_T=np.concatenate(in_prompt),
        image_I=np.array([distinct.index(image) for image in shown]),
        device=CPU,
    )


def packed_logits(model: Qwen3VL, folder: Path, samples: list[Sample]) -> list[torch.Tensor]:
    lengths = [len(s.ids) for s in samples]
    inputs, positions = packed_inputs(model, folder, samples)
    tokens = torch.tensor([t for s in samples for t in s.ids])
    with torch.no_grad():
        logits = model(
            tokens[None],
            positions=torch.from_numpy(positions)[:, None],
            attend=PackedAttention(torch.tensor(lengths)),
            images=inputs,
            output_fn=lambda hidden: model.output(hidden[0]),
        )
    return list(logits.split(lengths))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_packed_logits_equal_hugging_faces_padded_logits(
    models: tuple[Any, Qwen3VL, Path], samples: list[Sample], padding: str
) -> None:
    theirs, ours, folder = models
    expected = hugging_face(theirs, folder, samples, padding)
    for a, b in zip(packed_logits(ours, folder, samples), expected, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def test_logits_of_a_single_prompt_equal_hugging_faces(
    models: tuple[Any, Qwen3VL, Path], samples: list[Sample]
) -> None:
    theirs, ours, folder = models
    for sample in samples[1:]:
        (expected,) = hugging_face(theirs, folder, [sample], "right")
        torch.testing.assert_close(packed_logits(ours, folder, [sample])[0], expected, **TOLERANCE)


def test_without_images_it_equals_a_text_model(models: tuple[Any, Qwen3VL, Path], samples: list[Sample]) -> None:
    theirs, ours, folder = models
    (expected,) = hugging_face(theirs, folder, samples[:1], "right")
    length = len(samples[0].ids)
    with torch.no_grad():
        logits = ours(
            torch.tensor(samples[0].ids)[None],
            positions=torch.arange(length)[None],
            attend=PackedAttention(torch.tensor([length])),
            output_fn=ours.output,
        )
    torch.testing.assert_close(logits[0], expected, **TOLERANCE)


def test_images_change_the_logits(models: tuple[Any, Qwen3VL, Path], samples: list[Sample]) -> None:
    """Otherwise the comparisons above would prove little."""
    _, ours, folder = models
    sample = samples[1]
    seen = packed_logits(ours, folder, [sample])[0]
    sample = Sample(ImageProcessor(folder), SIZES[1], 1)
    sample.images = [picture(*SIZES[1][0], seed=99)]
    assert (packed_logits(ours, folder, [sample])[0] - seen)[-1].abs().max() > 0.1


def test_logits_with_shared_prompts_equal_hugging_faces(models: tuple[Any, Qwen3VL, Path]) -> None:
    """Prompts come first, then completions, which attend to their prompt's images and continue its positions."""
    theirs, ours, folder = models
    processor = ImageProcessor(folder)
    samples = [Sample(processor, SIZES[number], number, tail) for number, tail in ((2, 5), (2, 8), (1, 3))]
    prompts, prompt_of = [samples[0].prompt, samples[2].prompt], np.array([0, 0, 1])
    prompt_lengths, lengths = np.array([len(p) for p in prompts]), np.array([len(s.tail) for s in samples])
    starts = prompt_lengths[prompt_of]
    images = list(dict.fromkeys([*samples[0].images, *samples[2].images]))
    ids = np.concatenate([*prompts, *(s.tail for s in samples)])
    inputs, positions = image_inputs(
        ours,
        processor.pixels(images),
        tokens_T=ids,
        positions_T=np.concatenate(
            [*map(np.arange, prompt_lengths), *(a + np.arange(n) for a, n in zip(starts, lengths, strict=True))]
        ),
        document_T=np.concatenate([np.repeat([0, 1], prompt_lengths), np.repeat(prompt_of, lengths)]),
        given_T=np.arange(len(ids)) < prompt_lengths.sum(),
        image_I=np.array([images.index(image) for s in (samples[0], samples[2]) for image in s.images]),
        device=CPU,
    )
    attend = SharedPrefixAttention(*(torch.from_numpy(x) for x in (prompt_lengths, lengths, prompt_of)))
    with torch.no_grad():
        logits = ours(
            torch.from_numpy(ids)[None],
            positions=torch.from_numpy(positions)[:, None],
            attend=attend,
            images=inputs,
            output_fn=lambda hidden: ours.output(hidden[0]),
        )
    expected = hugging_face(theirs, folder, samples, "right")
    *of_prompts, a, b, c = logits.split([*prompt_lengths, *lengths])
    for mine, sample, theirs_ in zip((a, b, c), samples, expected, strict=True):
        torch.testing.assert_close(mine, theirs_[len(sample.prompt) :], **TOLERANCE)
    for mine, theirs_ in zip(of_prompts, (expected[0], expected[2]), strict=True):
        torch.testing.assert_close(mine, theirs_[: len(mine)], **TOLERANCE)


def test_positions_equal_hugging_faces(models: tuple[Any, Qwen3VL, Path], samples: list[Sample]) -> None:
    theirs, ours, folder = models
    _, positions = packed_inputs(ours, folder, samples)
    parts = np.split(positions, np.cumsum([len(s.ids) for s in samples])[:-1], axis=1)
    for sample, part in zip(samples, parts, strict=True):
        ids = torch.tensor(sample.ids)[None]
        grid = torch.from_numpy(ImageProcessor(folder).pixels(sample.images).grid_IT) if sample.images else None
        kinds = (ids == ours.image_token).int()
        expected, _ = theirs.model.get_rope_index(ids, kinds, grid)
        np.testing.assert_array_equal(part, expected[:, 0].numpy())


def test_a_sampled_image_placeholder_is_an_ordinary_token(
    models: tuple[Any, Qwen3VL, Path], samples: list[Sample]
) -> None:
    _, ours, folder = models
    plain, odd = samples[1], Sample(ImageProcessor(folder), SIZES[1], 1)
    odd.tail[3] = ours.image_token
    (inputs, positions), (odd_inputs, odd_positions) = (packed_inputs(ours, folder, [s]) for s in (plain, odd))
    assert torch.equal(inputs.index_M, odd_inputs.index_M)
    np.testing.assert_array_equal(positions, odd_positions)


def _one_fewer(sample: Sample, model: Qwen3VL) -> None:
    sample.prompt.remove(model.image_token)


def _of_another_size(sample: Sample, model: Qwen3VL) -> None:
    """The same number of features in total, but with the images swapped."""
    sample.images.reverse()


def _film(sample: Sample, model: Qwen3VL) -> None:
    sample.prompt[0] = model.video_token


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_one_fewer, "hold 15 image placeholders, but their images have 16 features"),
        (_of_another_size, "not as long as its image"),
        (_film, "video"),
    ],
)
def test_images_that_do_not_match_the_placeholders_are_refused(
    models: tuple[Any, Qwen3VL, Path], damage: Any, words: str
) -> None:
    _, ours, folder = models
    sample = Sample(ImageProcessor(folder), SIZES[2], 2)
    damage(sample, ours)
    with pytest.raises(ValueError, match=words):
        packed_inputs(ours, folder, [sample])


def test_names_map_both_ways(models: tuple[Any, Qwen3VL, Path]) -> None:
    _, ours, folder = models
    stored = load_file(folder / "model.safetensors")
    for name in stored:
        mine = FAMILY.names.parameter_from_hf(name)
        assert mine is not None and FAMILY.names.parameter_to_hf(mine) == name
    assert {FAMILY.names.parameter_to_hf(name) for name, _ in ours.named_parameters()} == set(stored)


def test_quantisation_leaves_the_vision_tower_alone(models: tuple[Any, Qwen3VL, Path]) -> None:
    quantized = load_decoder(models[2], dtype=torch.float32, device=CPU, quantize_base=True)
    nf4 = {name for name, p in quantized.named_parameters() if isinstance(p, NF4Tensor)}
    assert len(nf4) == len(LINEARS) * len(quantized.layers) and all(name.startswith("layers.") for name in nf4)
