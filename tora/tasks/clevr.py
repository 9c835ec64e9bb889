"""CLEVR counting, in the columns of R1-V's CLEVR-70k: a rendered scene, a question such as "How many items are there in
the image?", and the answer in tags."""

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
    """Rows `{prompt, images, answer}`; the answer is what `solution` has in its tags. Score them with `math_answer`.

    The hub's dataset has one split: hold out a part of it, as in `train[:-512]` and `train[-512:]`. `path` is that, or
    a local file or folder with the columns `image`, `problem`, `solution`. Raises `ConfigError` when it cannot be
    loaded or has other columns.
    """

    def make(row: dict[str, Any]) -> dict[str, Any]:
        answer = final_answer(row["solution"])
        if answer is None:
            raise ConfigError("has a solution without <answer></answer> tags")
        return {"prompt": f"{row['problem'].strip()}\n{instruction}", "images": [row["image"]], "answer": answer}

    return TaskRows(load_task(path, split), path, {"image", "problem", "solution"}, make)
