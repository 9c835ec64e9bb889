"""Tasks with images: handwritten digits, and loaders of hub datasets on files with the same columns."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from tora.errors import ConfigError
from tora.models.vision.processor import ImageProcessor, decode
from tora.rewards.functions import math_answer
from tora.tasks.clevr import clevr
from tora.tasks.digits import digits, picture, pictures_of, values
from tora.tasks.digits_lookup import PLACES, DigitsLookup, digits_lookup
from tora.tasks.geometry3k import geometry3k
from tora.tasks.image_rows import encoded, take_images

pytestmark = pytest.mark.usefixtures("datasets_cache")
BASE = Path(__file__).parents[2] / "configs" / "bases" / "digits"


def parquet(path: Path, rows: list[dict[str, Any]], **images: Any) -> str:
    features = datasets.Features({**dict.fromkeys(rows[0], datasets.Value("string")), **images})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return str(path)


def scene(shade: int) -> bytes:
    return encoded(Image.new("L", (48, 32), shade))


def test_splits_of_digits_share_no_picture():
    train, test = (set(pictures_of(split)) for split in ("train", "test"))
    assert (len(train), len(test)) == (1347, 450) and not train & test
    shown = {bytes(row["images"][0]) for row in digits("test", 50, count=1)}
    assert shown <= {picture((i,)) for i in test}


def test_digits_stand_side_by_side_and_the_answer_is_their_sum():
    left, right = 5, 8
    both, alone = (np.asarray(decode(picture(i))) for i in ((left, right), (left,)))
    assert both.shape == (64, 128, 3)
    np.testing.assert_array_equal(both[:, :56], alone[:, :56])  # only the seam is smoothed
    rows = digits("train", 200)
    by_picture = {picture((i, j)): sum(values((i, j))) for i, j in rows.draws}
    assert [str(by_picture[row["images"][0]]) for row in rows] == [row["answer"] for row in rows]
    assert {row["answer"] for row in digits("train", 300, count=1)} == set("0123456789")
    assert digits("train", 5)[3] == digits("train", 5)[3] != digits("train", 5, seed=1)[3]


@pytest.mark.parametrize("wrong", [{"split": "dev"}, {"num_rows": 0}, {"count": 3}])
def test_digits_refuse_invalid_arguments(wrong: dict[str, Any]):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        digits(**wrong)


def test_clevr_rows(tmp_path: Path):
    rows = [
        {"image": {"bytes": scene(i)}, "problem": "How many items are there? ", "solution": f"<answer> {i} </answer>"}
        for i in range(4)
    ]
    path = parquet(tmp_path / "clevr.parquet", rows, image=datasets.Image())
    found = clevr(path=path, split="train[:-1]")
    assert len(found) == 3
    source, images = take_images(row := found[2])
    assert images == (scene(2),) and row == {"answer": "2"}
    assert source[0]["content"][0] == {"type": "image"}
    assert source[0]["content"][1]["text"].startswith("How many items are there?\nThink")
    assert math_answer([""] * 2, ["<answer>2</answer>", "<answer>3</answer>"], answer=[row["answer"]] * 2) == [1, 0]
    rows[1]["solution"] = "3"
    with pytest.raises(ConfigError, match=r"row 1 has a solution without"):
        clevr(path=parquet(tmp_path / "other.parquet", rows, image=datasets.Image()))[1]


def test_geometry3k_rows(tmp_path: Path):
    problems = ["<image>Find $x$.", "In <image> and <image>, find $y$.", "Find $z$."]
    rows = [
        {"images": [{"bytes": scene(10 * i + j)} for j in range(max(1, i + 1))], "problem": problem, "answer": "3"}
        for i, problem in enumerate(problems)
    ]
    path = parquet(tmp_path / "geometry.parquet", rows, images=datasets.List(datasets.Image()))
    found = geometry3k(path=path)
    source, images = take_images(found[1])
    assert images == (scene(10), scene(11))
    assert [part.get("text", part["type"])[:13] for part in source[0]["content"]] == [
        "In ", "image", " and ", "image", ", find $y$.", "\nThink step b",
    ]  # fmt: skip
    assert take_images(found[0])[0][0]["content"][0] == {"type": "image"}
    with pytest.raises(ConfigError, match="row 2 has 0 <image> marks and 3 images"):
        found[2]


def test_a_loader_names_the_column_that_is_missing(tmp_path: Path):
    path = parquet(tmp_path / "rows.parquet", [{"problem": "?", "answer": "1"}])
    with pytest.raises(ConfigError, match="no column 'image'"):
        clevr(path=path)
    with pytest.raises(ConfigError, match="no column 'images'"):
        geometry3k(path=path)


def test_the_base_is_small_and_holds_no_absolute_path():
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 1.75 * 2**20
    for file in BASE.glob("*config.json"):
        assert not re.search(r'"/\w', file.read_text()), file


def test_the_bases_processor_gives_eight_tokens_per_picture():
    processor = ImageProcessor(BASE)
    row = digits("test", 1)[0]
    assert processor.encode(row["prompt"], row["images"]).count(processor.image_token_id) == 8


def test_a_digit_is_looked_up_by_its_place():
    rows = digits_lookup("test", 8)
    assert rows[3] == digits_lookup("test", 4)[3]
    for row in (rows[i] for i in range(8)):
        (part, question) = row["prompt"][0]["content"]
        assert part == {"type": "image"} and Image.open(io.BytesIO(row["images"][0])).size == (32, 32)
        assert set(row["indices"]) <= set(pictures_of("test"))
        game = DigitsLookup()
        game.reset(**row)
        place = question["text"].removeprefix("Which digit is at the ").removesuffix("?")
        index = row["indices"][PLACES.index(place)]
        assert game.look(place).tobytes() == Image.open(io.BytesIO(picture((index,)))).tobytes()
        assert row["answer"] == str(values((index,))[0])
        with pytest.raises(ValueError, match="top left"):
            game.look("middle")
    for wrong in ({"split": "dev"}, {"num_rows": 0}):
        with pytest.raises(ConfigError, match="digits_lookup: "):
            digits_lookup(**wrong)
