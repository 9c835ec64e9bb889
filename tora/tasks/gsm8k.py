"""GSM8K: grade-school word problems; the answer is the number after `####`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tora.errors import ConfigError
from tora.tasks.dataset import load_files, load_hub

INSTRUCTION = "Think step by step, then give the final number inside <answer></answer> tags."


class GSM8K:
    """Rows `{prompt, answer}`; the prompt is the question and the instruction, the answer the bare number."""

    def __init__(self, table: Any, source: str, instruction: str) -> None:
        missing = {"question", "answer"} - set(table.column_names)
        if missing:
            raise ConfigError(f"{source} has no column {min(missing)!r}: GSM8K has `question` and `answer`")
        self._table = table
        self._source = source
        self._instruction = instruction

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._table[index]
        _, mark, answer = row["answer"].rpartition("####")
        if not mark:
            raise ConfigError(f"{self._source}: the answer of row {index} has no `####`")
        return {
            "prompt": f"{row['question'].strip()}\n{self._instruction}",
            "answer": answer.strip().replace(",", ""),
        }


def gsm8k(
    split: str = "train",
    path: str = "openai/gsm8k",
    subset: str = "main",
    instruction: str = INSTRUCTION,
) -> GSM8K:
    """`path` is a hub dataset, or a local file or folder with the same columns. Score it with `math_answer`.

    Raises `ConfigError` when it cannot be loaded or has other columns.
    """
    table = load_files(path, split) if Path(path).exists() else load_hub(path, subset, split)
    return GSM8K(table, path, instruction)
