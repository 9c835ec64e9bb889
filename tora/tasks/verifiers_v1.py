"""The tasks of a verifiers v1 environment as a dataset. They are played by `tora.environments.verifiers_v1.play`."""

from __future__ import annotations

from typing import Any

from tora.environments.elsewhere import Elsewhere, RemoteError
from tora.errors import ConfigError

_TASKS = "tora.environments.verifiers_v1.tasks"


def tasks(
    environment: dict[str, Any], python: str, first: int = 0, num_rows: int | None = None
) -> list[dict[str, Any]]:
    """Rows `{prompt, environment, task}`.

        dataset:
          _component_: tora.tasks.verifiers_v1.tasks
          python: ~/verifiers/bin/python
          environment: {taskset: {id: gsm8k-v1}}
        agent: tora.environments.verifiers_v1.play
        agent_python: ~/verifiers/bin/python

    `environment`: what verifiers takes as its `env` table. `python`: an interpreter that has verifiers and the
    environment. `first`: number of the first task. `num_rows`: how many; None for all.

    Raises ConfigError if the interpreter, verifiers or the environment is missing, or there are no such tasks.
    """
    there = Elsewhere(python, _TASKS)
    try:
        rows = there(environment=environment, first=first, count=num_rows)
    except RemoteError as error:
        raise ConfigError(f"the tasks of verifiers cannot be read in {python}: {error}") from error
    finally:
        there.close()
    if not rows:
        raise ConfigError(f"verifiers has no tasks from number {first} for environment={environment}")
    return rows
