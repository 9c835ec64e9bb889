"""Metrics to trackio, which keeps them in a local database or in a Hugging Face Space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tora.errors import ConfigError
from tora.reporting.tables import TABLE, Row, table_cells


class TrackioLogger:
    """A metric logger with torchtune's interface."""

    def __init__(self, run_id: str, run_name: str, project: str = "tora", **arguments: Any) -> None:
        """`arguments` go to `trackio.init`, such as `space_id` and `group`. A run is named by its name and id, by which
        trackio knows it, so that a resumed run goes on in the same place. Raises ConfigError without trackio."""
        try:
            import trackio
        except ImportError as error:
            raise ConfigError("tora.reporting.trackio.TrackioLogger needs trackio: pip install trackio.") from error
        self._trackio: Any = trackio
        self._arguments = {"project": project, "name": f"{run_name}-{run_id}", "resume": "allow", **arguments}
        self._started = False

    def log_config(self, config: Any) -> None:
        """Starts the run, as trackio takes a config only then."""
        from omegaconf import OmegaConf

        self._start(OmegaConf.to_container(config, resolve=False))

    def _start(self, config: Any = None) -> None:
        if not self._started:
            self._trackio.init(config=config, **self._arguments)
            self._started = True

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        self._start()
        self._trackio.log(dict(payload), step=step)

    def log_table(self, rows: Sequence[Row], step: int) -> None:
        import pandas

        self._start()
        names, cells = table_cells(rows, self._trackio.Image)
        self._trackio.log({TABLE: self._trackio.Table(dataframe=pandas.DataFrame(cells, columns=names))}, step=step)

    def close(self) -> None:
        if self._started:
            self._trackio.finish()
            self._started = False
