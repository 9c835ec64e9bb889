"""A run's policies on the hub while it trains. None that fails ends the run."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from tora.config.schema import RunConfig
from tora.errors import described
from tora.reporting.hub import HubRepo
from tora.reporting.model_card import write_model_card

_log = logging.getLogger(__name__)

UPLOADS = ".uploads"
"""The folder in the output folder with policies that are on their way to the hub."""


class Uploads:
    """One upload at a time, in a thread that does not keep the process alive."""

    def __init__(self, cfg: RunConfig, folder: Path, make_repo: Callable[[], HubRepo]) -> None:
        """`folder`: the run's. `make_repo`: is called until it does not raise ConfigError."""
        self._cfg, self._folder, self._make_repo = cfg, folder, make_repo
        self._kind = "model" if cfg.model.lora_type == "full" else "adapter"
        self._repo: HubRepo | None = None
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return self._cfg.hub_model_id or self._cfg.name

    def connect(self) -> HubRepo:
        """Raises ConfigError if the hub gives no access to the repository."""
        if self._repo is None:
            self._repo = self._make_repo()
        return self._repo

    def start(self, exported: Path, step: int) -> None:
        """Upload the policy after `step` steps from a folder that nobody else uses, which is deleted afterwards. Left
        out while an earlier upload goes on."""
        if self._thread is not None and self._thread.is_alive():
            shutil.rmtree(exported, ignore_errors=True)
            return

        def work() -> None:
            try:
                if error := self._try(exported, step):
                    _log.warning("step %d is not on the hub: %s; the next checkpoint is uploaded again", step, error)
            finally:
                shutil.rmtree(exported, ignore_errors=True)

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def finish(self, result: Path, step: int, stop_requested: Callable[[], bool]) -> None:
        """Upload the last policy, after what is under way, and return when that is done, has failed for good, or is
        given up because of a stop. The model card stays in `result`."""
        failures: list[str] = []

        def work() -> None:
            failures.extend(filter(None, [self._try(result, step)]))

        for thread in (self._thread, threading.Thread(target=work, daemon=True)):
            if thread is None:
                continue
            if not thread.ident:
                thread.start()
            while thread.is_alive():
                thread.join(0.1)
                if stop_requested():
                    failures.append("stopped")
                    break
            if failures:
                break
        if failures:
            remedy = f"tora export {self._folder} --push {self.name}"
            _log.warning("the trained policy is not on the hub: %s; `%s` uploads it", failures[0], remedy)
        else:
            print(f"pushed  {self.connect().url}", flush=True)

    def close(self) -> None:
        """Delete what is on its way."""
        shutil.rmtree(self._folder / UPLOADS, ignore_errors=True)

    def _try(self, exported: Path, step: int) -> str | None:
        """Why it is not on the hub; None if it is. huggingface_hub tries again by itself when the hub is unwell."""
        try:
            write_model_card(exported, self._kind, self._cfg, run=self._folder, step=step)
            self.connect().upload(exported, f"Step {step}")
        except Exception as error:  # whatever it is, the run goes on
            return described(error)
        return None
