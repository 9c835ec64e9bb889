"""Geometry3K: high-school geometry problems with diagrams; `<image>` marks their places in the problem's text."""

from __future__ import annotations

from typing import Any

from tora.errors import ConfigError
from tora.tasks.table import TaskRows, load_task

INSTRUCTION = "Think step by step, then give the final answer in \\boxed{}."
_MARK = "<image>"


def geometry3k(
    split: str = "train",
    path: str = "hiyouga/geometry3k",
    instruction: str = INSTRUCTION,
) -> TaskRows:
    """Rows `{prompt, images, answer}`. Score with `math_answer`.

    `path` is a hub dataset, or a local file or folder with the columns `images`, `problem` and `answer`. Raises
    ConfigError if it cannot be loaded or lacks a column, or a row has more or fewer marks than images.
    """

    def make(row: dict[str, Any]) -> dict[str, Any]:
        before, *texts = row["problem"].split(_MARK)
        if len(texts) != len(row["images"]):
            raise ConfigError(f"has {len(texts)} {_MARK} marks and {len(row['images'])} images")
        content: list[dict[str, str]] = [{"type": "text", "text": before}] if before.strip() else []
        for text in texts:
            content += [{"type": "image"}, {"type": "text", "text": text}]
        content += [{"type": "text", "text": f"\n{instruction}"}]
        answer = str(row["answer"]).strip()
        return {"prompt": [{"role": "user", "content": content}], "images": row["images"], "answer": answer}

    return TaskRows(load_task(path, split), path, {"images", "problem", "answer"}, make)
