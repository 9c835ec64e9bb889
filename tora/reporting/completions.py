"""Completions as tables: one row per rollout, with its prompt, rewards and images; and evaluated prompts with their
pass rates, which a `keep` of a dataset filters by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tora.reporting.evaluation import Passes, num_passed
from tora.types import Group, Prompt, Rollout

Row = dict[str, Any]


def rollout_rows(groups: Sequence[Group], advantages: Sequence[Sequence[float]] | None = None) -> list[Row]:
    """One row per rollout, in order. `advantages`: of each group's rollouts; None outside training."""
    return [
        {
            "prompt_id": group.prompt.id,
            "prompt": text_of(group.prompt),
            "completion": rollout.text,
            "reward": rollout.reward,
            **{f"reward/{name}": score for name, score in rollout.reward_parts.items()},
            **({} if advantages is None else {"advantage": float(advantages[g][i])}),
            "length": rollout.num_sampled,
            "stop_reason": str(rollout.stop_reason),
            "version": int(rollout.versions.min()),
            **(_episode(rollout) if rollout.messages else {}),
            **_images((*group.prompt.images, *rollout.images)),
        }
        for g, group in enumerate(groups)
        for i, rollout in enumerate(group.rollouts)
    ]


def evaluated_rows(groups: Sequence[Group], num_samples: int, passes: Passes | None) -> list[Row]:
    """As `rollout_rows`, with `passed` and, for each prompt, `pass_rate`; both null if nothing says what passes."""
    rates = _pass_rates(groups, num_samples, passes)
    rollouts = [(rollout, rate) for group, rate in zip(groups, rates, strict=True) for rollout in group.rollouts]
    return [
        {**row, "passed": None if passes is None else passes(rollout), "pass_rate": rate}
        for row, (rollout, rate) in zip(rollout_rows(groups), rollouts, strict=True)
    ]


def prompt_rows(groups: Sequence[Group], num_samples: int, passes: Passes | None) -> list[Row]:
    """One row per prompt as the dataset has it, with `pass_rate` and `reward_mean`."""
    return [
        {
            **dict(group.prompt.columns),
            "prompt": group.prompt.source,
            **_images(group.prompt.images),
            "pass_rate": rate,
            "reward_mean": sum(rollout.reward for rollout in group.rollouts) / num_samples,
        }
        for group, rate in zip(groups, _pass_rates(groups, num_samples, passes), strict=True)
    ]


def _pass_rates(groups: Sequence[Group], num_samples: int, passes: Passes | None) -> list[float | None]:
    if passes is None:
        return [None] * len(groups)
    return [count / num_samples for count in num_passed(groups, passes)]


def text_of(prompt: Prompt) -> str:
    """The prompt as a string: the question itself, or its messages, one after the other."""
    if isinstance(prompt.source, str):
        return prompt.source
    return "\n".join(f"{message['role']}: {content_text(message.get('content'))}" for message in prompt.source)


def content_text(content: Any) -> str:
    """A message's text, with its images named."""
    if content is None or isinstance(content, str):
        return content or ""
    return " ".join(part.get("text", f"<{part.get('type')}>") for part in content)


def _episode(rollout: Rollout) -> Row:
    counts = {"turns": rollout.turns, "tool_calls": rollout.tool_calls, "tool_errors": rollout.tool_errors}
    return {**counts, "messages": json.dumps([dict(message) for message in rollout.messages], default=str)}


def _images(images: Sequence[bytes]) -> Row:
    return {"images": [{"bytes": image, "path": None} for image in images]} if images else {}


def write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the rows, with null for a column that one of them lacks. A column whose values Arrow cannot hold in one
    type is written as JSON. Replaces `path` as a whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: _column(pa, [row.get(name) for row in rows]) for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    pq.write_table(pa.table(columns), aside)
    aside.replace(path)


def _column(pa: Any, values: list[Any]) -> Any:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return pa.array([None if value is None else json.dumps(value, default=str) for value in values])


def read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()
