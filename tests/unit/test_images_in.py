"""Images as people bring them: deep samples, orientation, addresses, and tags in the text."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tora.errors import ConfigError
from tora.models.vision.processor import decode, has_image_processor
from tora.tasks.image_rows import encoded, take_images

BASES = Path(__file__).parents[2] / "configs" / "bases"
IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "?"}


def file_of(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_16_bit_samples_are_scaled() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    expected = np.linspace(0, 255, 256)
    for image in (file_of(Image.fromarray(ramp)), encoded(Image.fromarray(ramp))):
        assert np.abs(np.asarray(decode(image))[0, :, 0] - expected).max() <= 1


@pytest.mark.parametrize(("samples", "words"), [(np.float32, "32-bit float samples"), (np.int32, "32-bit samples")])
def test_samples_without_a_known_range_are_refused(samples: type, words: str) -> None:
    picture = Image.fromarray(np.full((4, 4), 70000, dtype=samples))
    with pytest.raises(ValueError, match=words):
        decode(file_of(picture, "TIFF"))


def test_a_pillow_image_keeps_its_orientation() -> None:
    """Orientation 6: the picture is shown turned by a quarter."""
    left_black = Image.fromarray(np.repeat([[0] * 8 + [255] * 8], 8, 0).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = file_of(left_black, "JPEG", exif=exif, quality=100)
    by_file, by_object = decode(jpeg), decode(encoded(Image.open(io.BytesIO(jpeg))))
    assert by_file.size == by_object.size == (8, 16)
    assert np.abs(np.asarray(by_file).astype(int) - np.asarray(by_object)).max() <= 1


def test_a_file_address_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    path.write_bytes(file_of(Image.new("L", (2, 2))))
    assert encoded(path.as_uri()) == path.read_bytes()
    with pytest.raises(ConfigError, match=r"is not a file"):
        encoded("file:///nowhere.png")
    with pytest.raises(ConfigError, match=r"on the web; .* download it first"):
        encoded("https://example.com/a.png")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Look: <image>?", [{"type": "text", "text": "Look: "}, IMAGE, TEXT]),
        ("<image>?", [IMAGE, TEXT]),
        ("?", [IMAGE, TEXT]),
    ],
)
def test_a_tag_in_the_text_marks_the_images_place(text: str, parts: list[dict[str, Any]]) -> None:
    for prompt in (text, [{"role": "user", "content": text}]):
        assert take_images({"prompt": prompt, "images": [b"a"]}) == ([{"role": "user", "content": parts}], (b"a",))


def test_tags_without_images_are_text_and_their_number_must_fit() -> None:
    assert take_images({"prompt": "<image>?"}) == ("<image>?", ())
    with pytest.raises(ConfigError, match=r"more placeholders than it has images"):
        take_images({"prompt": "<image><image>?", "images": [b"a"]})
    with pytest.raises(ConfigError, match=r"placeholders for 1 of its 2 images"):
        take_images({"prompt": "<image>?", "images": [b"a", b"b"]})


def test_folders_whose_processor_is_missing_or_stray(tmp_path: Path) -> None:
    shutil.copytree(BASES / "digits", tmp_path / "vl")
    assert has_image_processor(tmp_path / "vl")
    (tmp_path / "vl" / "processor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"takes images but holds neither preprocessor_config.json nor"):
        has_image_processor(tmp_path / "vl")
    shutil.copytree(BASES / "chain_sum", tmp_path / "text")
    (tmp_path / "text" / "preprocessor_config.json").write_text("{}")
    assert not has_image_processor(tmp_path / "text")
