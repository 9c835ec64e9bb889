"""CLEVR counting: a rendered scene, a question such as "How many items are there in the image?", and a number.

Reads the columns of R1-V's CLEVR-70k.
"""

from __future__ import annotations

from typing import Any

from tora.errors import ConfigError
from tora.rewards.functions import final_answer
from tora.tasks.table import TaskRows, load_task

INSTRUCTION = "Think step by step, then give the final number inside <answer></answer> tags."


def clevr(
    split: str = "train",
    path: str = "leonardPKU/clevr_cogen_a_train",
    instruction: str = INSTRUCTION,
) -> TaskRows:
    """Rows `{prompt, images, answer}`; the answer is the text inside the tags of `solution`. Score with `math_answer`.

    `path` is a hub dataset, or a local file or folder with the columns `image`, `problem` and `solution`. The hub
    dataset has only one split: hold out part of it, as with `train[:-512]` and `train[-512:]`. Raises ConfigError if
    the dataset cannot be loaded or lacks a column.
    """

    def make(row: dict[str, Any]) -> dict[str, Any]:
        answer = final_answer(row["solution"])
        if answer is None:
            raise ConfigError("has a solution without <answer></answer> tags")
        return {"prompt": f"{row['problem'].strip()}\n{instruction}", "images": [row["image"]], "answer": answer}

    return TaskRows(load_task(path, split), path, {"image", "problem", "solution"}, make)
