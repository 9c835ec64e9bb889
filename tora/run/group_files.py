"""Finished groups in a checkpoint: arrays in safetensors, everything else in JSON, nothing pickled.

Prompts are not stored. Loading takes each from the prompt stream by id and verifies its token ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from tora.errors import ConfigError
from tora.models.vision.encoded_image import EncodedImage
from tora.types import Group, Prompt, Rollout, StopReason

_ARRAYS, _VALUES = "groups.safetensors", "groups.json"


def save_groups(folder: Path, finished: Sequence[tuple[int, Group]]) -> None:
    """`finished`: groups, each with the policy version under which it was started. Writes no file if there are none."""
    from safetensors.numpy import save_file

    if not finished:
        return
    arrays: dict[str, np.ndarray] = {}
    rows = []
    for number, (born, group) in enumerate(finished):
        arrays[f"{number}.prompt"] = np.asarray(group.prompt.token_ids, dtype=np.int64)
        rollouts = []
        for index, rollout in enumerate(group.rollouts):
            values = {f.name: getattr(rollout, f.name) for f in fields(Rollout) if f.name != "images"}
            shown = {f"{number}.{index}.image.{i}": image for i, image in enumerate(rollout.images)}
            arrays |= {name: np.frombuffer(image, dtype=np.uint8) for name, image in shown.items()}
            arrays |= {f"{number}.{index}.{k}": v for k, v in values.items() if isinstance(v, np.ndarray)}
            rollouts.append({k: v for k, v in values.items() if not isinstance(v, np.ndarray)})
        rows.append({"born": born, "prompt": group.prompt.id, "seconds": group.seconds, "rollouts": rollouts})
    save_file(arrays, folder / _ARRAYS)
    (folder / _VALUES).write_text(json.dumps(rows))


def load_groups(folder: Path, prompt_at: Callable[[int], Prompt]) -> list[tuple[int, Group]]:
    """The inverse of `save_groups`. Raises ConfigError if the stream now yields another prompt under a group's id."""
    from safetensors.numpy import load_file

    if not (folder / _VALUES).exists():
        return []
    arrays, finished = load_file(folder / _ARRAYS), []
    for number, row in enumerate(json.loads((folder / _VALUES).read_text())):
        prompt = prompt_at(row["prompt"])
        if list(prompt.token_ids) != arrays[f"{number}.prompt"].tolist():
            raise ConfigError(
                f"checkpoint {folder} was written with another dataset, tokenizer or seed: prompt {prompt.id} differs"
            )
        rollouts = [_rollout(values, arrays, f"{number}.{index}.") for index, values in enumerate(row["rollouts"])]
        finished.append((row["born"], Group(prompt, tuple(rollouts), row["seconds"])))
    return finished


def _rollout(values: dict[str, Any], arrays: dict[str, np.ndarray], prefix: str) -> Rollout:
    array_values: dict[str, Any] = {
        f.name: arrays[prefix + f.name] for f in fields(Rollout) if prefix + f.name in arrays
    }
    values = dict(values)
    if "stopped" in values:  # written before rollouts knew their stop reason and which tokens were sampled
        values["stop_reason"] = StopReason.STOP if values.pop("stopped") else StopReason.LENGTH
        array_values["sampled"] = np.ones(len(array_values["token_ids"]), dtype=bool)
    values["stop_reason"] = StopReason(values["stop_reason"])
    images = takewhile(lambda name: name in arrays, (f"{prefix}image.{i}" for i in count()))
    return Rollout(**values, **array_values, images=tuple(EncodedImage(arrays[name].data) for name in images))
