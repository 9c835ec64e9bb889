"""GSM8K: grade-school word problems, whose answer is the number after `####`."""

from __future__ import annotations

from typing import Any

from tora.errors import ConfigError
from tora.tasks.table import TaskRows, load_task

INSTRUCTION = "Think step by step, then give the final number inside <answer></answer> tags."


def gsm8k(
    split: str = "train",
    path: str = "openai/gsm8k",
    subset: str = "main",
    instruction: str = INSTRUCTION,
) -> TaskRows:
    """Rows `{prompt, answer}`: question with instruction, and the bare number. Score with `math_answer`.

    `path` is a hub dataset, or a local file or folder with the columns `question` and `answer`. Raises ConfigError if
    it cannot be loaded or lacks a column, or an answer has no `####`.
    """

    def make(row: dict[str, Any]) -> dict[str, Any]:
        _, mark, answer = row["answer"].rpartition("####")
        if not mark:
            raise ConfigError("has an answer without `####`")
        return {"prompt": f"{row['question'].strip()}\n{instruction}", "answer": answer.strip().replace(",", "")}

    return TaskRows(load_task(path, split, subset), path, {"question", "answer"}, make)
