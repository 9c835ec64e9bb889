"""Images from rows to pixels and token ids, against the model's own Hugging Face processor."""

from __future__ import annotations

import base64
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from tora.errors import ConfigError
from tora.models.vision.processor import ImageProcessor, decode, has_image_processor
from tora.tasks.dataset import file_dataset
from tora.tasks.image_rows import encoded, take_images
from tora.tasks.prompts import PromptStream

pytestmark = pytest.mark.usefixtures("datasets_cache")
CONFIGS = Path(__file__).parents[2] / "configs"
BASE = CONFIGS / "bases" / "digits"
SIZES = [(64, 100), (300, 500), (20, 33)]
TEXT = {"type": "text", "text": "What is it?"}
BARE = {"type": "image"}


@pytest.fixture(scope="module")
def processor() -> ImageProcessor:
    return ImageProcessor(BASE)


def noise(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    values = np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values, "RGBA").convert(mode)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


# processor


@pytest.mark.parametrize("max_pixels", [None, 64 * 64])
def test_ids_and_pixels_are_those_of_the_models_own_processor(max_pixels: int | None):
    pictures = [noise(*size) for size in SIZES]
    messages = user(
        {"type": "image", "image": pictures[0]}, TEXT, *({"type": "image", "image": p} for p in pictures[1:])
    )
    size = {"shortest_edge": 32 * 32, "longest_edge": max_pixels or 256 * 256}
    expected = AutoProcessor.from_pretrained(BASE).apply_chat_template(
        messages,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"images_kwargs": {"size": size}},
    )
    images = [png(p) for p in pictures]
    processor = ImageProcessor(BASE, max_pixels)
    ids = processor.encode(user(BARE, TEXT, BARE, BARE), images)
    assert list(ids) == expected["input_ids"][0].tolist()
    pixels = processor.pixels(images)
    assert pixels.patches_ND.dtype == np.float32 and pixels.grid_IT.dtype == np.int64
    np.testing.assert_array_equal(pixels.patches_ND, expected["pixel_values"].numpy())
    np.testing.assert_array_equal(pixels.grid_IT, expected["image_grid_thw"].numpy())
    assert [processor.num_tokens(i) for i in images] == (pixels.grid_IT.prod(1) // 4).tolist()
    if max_pixels is not None:
        assert (pixels.grid_IT.prod(1) * 16 * 16 <= max_pixels).all()


def test_an_images_pixels_do_not_depend_on_its_neighbours(processor: ImageProcessor):
    images = [png(noise(*size)) for size in [*SIZES, SIZES[0]]]
    alone = np.concatenate([processor.pixels([i]).patches_ND for i in images])
    np.testing.assert_array_equal(alone, processor.pixels(images).patches_ND)


def test_processor_refuses(tmp_path: Path, processor: ImageProcessor):
    assert not has_image_processor(CONFIGS / "bases" / "chain_sum")
    with pytest.raises(ConfigError, match="holds no image processor"):
        ImageProcessor(CONFIGS / "bases" / "chain_sum")
    with pytest.raises(ConfigError, match=r"rollout.max_pixels=1000 is below .* 1024 pixels"):
        ImageProcessor(BASE, 1000)
    with pytest.raises(ConfigError, match="1 image placeholders, but there are 0 images"):
        processor.encode(user(BARE), [])
    with pytest.raises(ConfigError, match="only text and images"):
        processor.encode(user({"type": "text", "text": "<|video_pad|>"}), [])
    with pytest.raises(ValueError, match="cannot be read"):
        processor.pixels([b"nonsense"])
    with pytest.raises(ValueError, match="aspect ratio"):
        processor.encode(user(BARE), [png(noise(4, 1000))])


def test_decode_is_upright_rgb_on_white():
    wide = noise(8, 16)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    wide.save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(buffer.getvalue())), np.rot90(np.asarray(wide), -1))
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    clear.putpixel((0, 0), (9, 9, 9, 255))
    pixels = np.asarray(decode(png(clear)))
    assert pixels[0, 0].tolist() == [9, 9, 9] and pixels[1, 1].tolist() == [255, 255, 255]
    for mode in ("L", "1", "P", "LA"):
        assert decode(png(noise(4, 4, mode))).mode == "RGB"


# forms of an image, and where a row may hold it


def test_every_form_of_an_image_gives_its_bytes(tmp_path: Path):
    picture = noise(8, 16)
    data = png(picture)
    (file := tmp_path / "a.png").write_bytes(data)
    url = data_url(data)
    for form in (data, bytearray(data), file, str(file), url, {"bytes": data, "path": None}, {"path": str(file)}):
        assert encoded(form) == data
    for mode in ("RGB", "L", "CMYK", "F"):
        np.testing.assert_array_equal(
            np.asarray(decode(encoded(picture.convert(mode)))), np.asarray(picture.convert(mode).convert("RGB"))
        )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://example.com/a.png", "is on the web"),
        ("nowhere.png", "is not a file"),
        ("data:image/png,abc", "is not of the form"),
        ("data:image/png;base64,@@", "is not base64"),
        ({"bytes": None, "path": None}, "has type NoneType"),
        (7, "has type int"),
    ],
)
def test_values_that_are_not_images_are_refused(image: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        encoded(image)


def test_images_stand_in_messages_or_in_a_column():
    a, b = png(noise(4, 4)), png(noise(4, 8))
    url = data_url(b)
    bare = user(BARE, TEXT, BARE)
    in_messages = [
        user({"type": "image", "image": a}, TEXT, {"type": "image_url", "image_url": {"url": url}}),
        user({"type": "image", "url": data_url(a)}, TEXT, {"type": "image", "base64": base64.b64encode(b).decode()}),
    ]
    rows: list[dict[str, Any]] = [{"prompt": messages} for messages in in_messages]
    rows.append({"prompt": bare, "images": [a, b], "image": None})
    rows.append({"prompt": user({"type": "image", "image": a}, TEXT, BARE), "image": b})
    for row in rows:
        assert take_images(row) == (bare, (a, b))
        assert row == {}
    before = user(BARE, BARE, TEXT)
    system = [{"role": "system", "content": "Be brief."}]
    for prompt in ("What is it?", user(TEXT), [{"role": "user", "content": "What is it?"}]):
        assert take_images({"prompt": prompt, "images": [a, b]}) == (before, (a, b))
    assert take_images({"prompt": system + user(TEXT), "images": [a, b]}) == (system + before, (a, b))
    assert take_images({"prompt": "1 + 1", "images": None, "answer": 2}) == ("1 + 1", ())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": user(BARE), "images": []}, "more placeholders than it has images"),
        ({"prompt": user(BARE), "images": [b"a", b"b"]}, "placeholders for 1 of its 2 images"),
        ({"prompt": user({"type": "video", "video": "a.mp4"})}, "no videos"),
        ({"prompt": "What?", "videos": ["a.mp4"]}, "no videos"),
        ({"prompt": user({"type": "imagee"})}, "the nearest is image"),
        ({"prompt": "What?", "image": b"a", "images": [b"b"]}, "both a column images and a column image"),
        ({"prompt": [{"role": "system", "content": "Hi."}], "image": b"a"}, "no user message"),
    ],
)
def test_rows_that_do_not_add_up_are_refused(row: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        take_images(row)


# files and streams


def test_a_parquet_column_of_images_arrives_as_it_is_in_the_file(tmp_path: Path, processor: ImageProcessor):
    images = [png(noise(40, 70, seed=i)) for i in range(4)]
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = [
        {"prompt": f"q{i}", "answer": str(i), "images": [{"bytes": b} for b in images[i : i + 2]]} for i in range(3)
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    stream = PromptStream(file_dataset(str(tmp_path / "rows.parquet")), None, 256, image_processor=processor)
    for i, prompt in enumerate(stream.sequential(3)):
        assert prompt.images == tuple(images[i : i + 2])
        assert prompt.columns == {"answer": str(i)}
        assert prompt.source == user(BARE, BARE, {"type": "text", "text": f"q{i}"})
        assert prompt.token_ids.count(processor.image_token_id) == sum(map(processor.num_tokens, prompt.images))


def test_an_image_travels_beside_the_message_that_has_it(tmp_path: Path, processor: ImageProcessor):
    """So Ray copies it once, into its object store. Plain bytes are part of the message, and copied with it."""
    image = png(noise(200, 300))
    (tmp_path / "a.png").write_bytes(image)
    forms = [image, bytearray(image), str(tmp_path / "a.png"), data_url(image), noise(200, 300), {"bytes": image}]
    rows = [{"prompt": [{"role": "user", "content": [BARE, TEXT]}], "images": [form]} for form in forms]
    stream = PromptStream(rows, processor._tokenizer, 500, 0, processor, shuffle=False)
    for position in range(len(rows)):
        prompt, apart = stream.prompt(position), []
        message = pickle.dumps([prompt, replace(prompt, id=9)], protocol=5, buffer_callback=apart.append)
        assert len(message) < 3000 < len(image) and len(apart) == 1, "once, though two prompts have it"
        received = pickle.loads(message, buffers=[memoryview(bytes(buffer.raw())) for buffer in apart])
        assert received == [prompt, replace(prompt, id=9)] and received[0].images == (image,)
        assert pickle.loads(pickle.dumps(prompt)) == prompt, "and through pipes"
        again: list[Any] = []
        assert len(pickle.dumps(received[0], protocol=5, buffer_callback=again.append)) < 3000, "and onwards"


def test_a_vision_models_prompt_needs_no_image(processor: ImageProcessor):
    (prompt,) = PromptStream([{"prompt": "1 + 1 ="}], None, 64, image_processor=processor).sequential(1)
    assert prompt.images == () and prompt.source == "1 + 1 ="
    assert prompt.token_ids == processor.encode([{"role": "user", "content": "1 + 1 ="}], [])


def test_streams_name_the_row_that_they_refuse(processor: ImageProcessor):
    tokenizer = AutoProcessor.from_pretrained(BASE).tokenizer
    row = {"prompt": "What?", "image": png(noise(40, 70))}
    with pytest.raises(ConfigError, match="row 0: it has 1 images, but the model takes none"):
        PromptStream([row], tokenizer, 64).sequential(1)
    with pytest.raises(ConfigError, match=r"row 1: .*cannot be read"):
        PromptStream([row, {**row, "image": b"a"}], None, 64, image_processor=processor).sequential(2)
    with pytest.raises(ConfigError, match="row 0 has a prompt of 76 tokens"):
        PromptStream([{**row, "image": png(noise(500, 500))}], None, 64, image_processor=processor).sequential(1)
