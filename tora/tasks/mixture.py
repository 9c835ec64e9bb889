"""Several datasets as one, mixed by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from tora.config.components import make
from tora.config.schema import Component
from tora.errors import ConfigError
from tora.tasks.dataset import Dataset, check_dataset

_LONGEST = 100_000_000


class Mixture:
    """Rows of several datasets, evenly interleaved in proportion to their weights."""

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
        """Each dataset is read in order, and again from its start once it is used up. An epoch ends when every row of
        every dataset has been read at least once. Weights are greater than 0."""
        self._datasets = datasets
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        longest = max(len(rows) / share for rows, share in zip(datasets, shares, strict=True))
        if longest > _LONGEST:
            raise ConfigError(
                f"the mixture repeats a dataset of small weight until an epoch has {longest:.3g} rows; at most "
                f"{_LONGEST:.0e} are possible"
            )
        # the k-th row of a dataset with share s stands at (k + 1/2) / s: its rows are equally far apart
        counts = [max(len(rows), round(longest * share)) for rows, share in zip(datasets, shares, strict=True)]
        places = [(np.arange(n) + 0.5) / share for n, share in zip(counts, shares, strict=True)]
        order = np.argsort(np.concatenate(places), kind="stable")
        self._dataset_of = np.repeat(np.arange(len(counts)), counts)[order]
        self._row_of = np.concatenate([np.arange(n) % len(d) for n, d in zip(counts, datasets, strict=True)])[order]

    def __len__(self) -> int:
        return len(self._row_of)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._datasets[int(self._dataset_of[index])][int(self._row_of[index])]


def mixture(datasets: list[Component]) -> Mixture:
    """The rows of `datasets`, each a component with a `weight` (1 by default): of every 10 prompts, a dataset with
    weight 3 beside one with weight 2 gives 6.

    An epoch lasts until every row has been seen; smaller datasets repeat. Raises ConfigError if there are no datasets
    or a weight is not greater than 0.
    """
    if not isinstance(datasets, list) or not datasets:
        raise ConfigError("mixture: datasets must be a list with at least one dataset")
    parts, weights = [], []
    for number, component in enumerate(datasets):
        if not isinstance(component, dict):
            raise ConfigError(f"mixture: datasets.{number} must hold _component_ and its arguments")
        weight = component.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 < float(weight) < math.inf:
            raise ConfigError(f"mixture: datasets.{number}.weight={weight!r} must be a number greater than 0")
        own = {key: value for key, value in component.items() if key != "weight"}
        parts.append(check_dataset(make(own, "dataset"), str(own.get("_component_"))))
        weights.append(float(weight))
    return Mixture(parts, weights)
