"""Metrics to MLflow, in a local database or on a tracking server."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from tora.errors import ConfigError
from tora.reporting.tables import TABLE, Row, table_cells

_TAG = "tora.run_id"
_LONGEST = 500
"""Characters of a parameter, which every store takes."""
_AT_ONCE = 100
"""Parameters that a request may hold."""


class MLflowLogger:
    """A metric logger with torchtune's interface."""

    def __init__(
        self, run_id: str, run_name: str, experiment: str = "tora", tracking_uri: str | None = None, **tags: Any
    ) -> None:
        """`tracking_uri`: null for MLflow's own default and MLFLOW_TRACKING_URI. `tags` are set on the run, which is
        found again by its id when it is resumed. Raises ConfigError without MLflow."""
        try:
            self._entities: Any = import_module("mlflow.entities")
            self._client: Any = import_module("mlflow").MlflowClient(tracking_uri=tracking_uri)
        except ImportError as error:
            raise ConfigError("tora.reporting.mlflow.MLflowLogger needs MLflow: pip install mlflow.") from error
        found = self._client.get_experiment_by_name(experiment)
        place = self._client.create_experiment(experiment) if found is None else found.experiment_id
        earlier = self._client.search_runs([place], f"tags.`{_TAG}` = '{run_id}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(place, run_name=run_name, tags={_TAG: run_id}).info.run_id
        for name, value in tags.items():
            self._client.set_tag(self._id, name, value)

    def log_config(self, config: Any) -> None:
        """All of it as the artifact `config.yaml`; as parameters, which MLflow never changes, the keys that a resumed
        run had not logged before."""
        from omegaconf import OmegaConf

        self._client.log_text(self._id, OmegaConf.to_yaml(config), "config.yaml")
        known = self._client.get_run(self._id).data.params
        flat = _flat(OmegaConf.to_container(config, resolve=False))
        new = [self._entities.Param(key, str(value)[:_LONGEST]) for key, value in flat.items() if key not in known]
        for first in range(0, len(new), _AT_ONCE):
            self._client.log_batch(self._id, params=new[first : first + _AT_ONCE])

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(_name(key), float(value), now, step) for key, value in payload.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def log_table(self, rows: Sequence[Row], step: int) -> None:
        """As the artifact `completions/step_N.json`, N from 1, which MLflow shows as a table."""
        names, cells = table_cells(rows, import_module("mlflow").Image)
        columns = {name: [row[index] for row in cells] for index, name in enumerate(names)}
        self._client.log_table(self._id, columns, f"{TABLE}/step_{step + 1}.json")

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _name(key: str) -> str:
    """MLflow takes letters, digits and a few signs: `eval/pass@1` becomes `eval/pass_1`."""
    return re.sub(r"[^\w\-. /]", "_", key)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings and lists by dotted keys."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and tree:
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{_name(key)}" if prefix else _name(key))
    return flat
