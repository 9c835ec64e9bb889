"""What callers queue for the engine's thread, and the error of those that it does not serve."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actors.abort import current_flag
from actors.vllm_engine.requests import LoadedPolicy, Slot
from tora.errors import RolloutError
from tora.types import PolicySnapshot

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.inputs import EngineInput


@dataclass(eq=False)
class Generate:
    prompts: Sequence[EngineInput]
    params: Sequence[SamplingParams]
    convert: Callable[[Any, int, LoadedPolicy], Any]
    """Makes a prompt's answer from vLLM's `RequestOutput`, the prompt's index and `policy`."""
    adapter: bool
    pinned: bool = False
    policy: LoadedPolicy | None = None
    """The newest when the requests began, or the pinned one."""
    done: dict[int, Any] = field(default_factory=dict)
    """Answers by index into `prompts`."""
    flag: threading.Event | None = field(default_factory=current_flag)
    """The caller's; see `actors.abort`."""
    future: Future[list[Any]] = field(default_factory=Future)

    @property
    def is_aborted(self) -> bool:
        return self.flag is not None and self.flag.is_set()


@dataclass(eq=False)
class Install:
    snapshot: PolicySnapshot
    slot: Slot
    staged: Any
    """The answer of `stage_snapshot`; None for a one-call install."""
    future: Future[tuple[Any, float]] = field(default_factory=Future)
    """The slot's contents after a one-call install, else None; and the seconds that generation stalled."""


@dataclass(eq=False)
class Sleep:
    future: Future[None] = field(default_factory=Future)


def engine_error(cause: BaseException | None) -> RolloutError:
    if cause is None:
        return RolloutError("the engine is closed")
    error = RolloutError(f"the engine's thread ended with {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
