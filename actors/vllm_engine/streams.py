"""The streams of a device: a sync's own, beside the one that vLLM's steps are queued on.

What is current, a stream and a device, is so for one thread. On a CPU every call is done when it returns.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch


class Streams(Protocol):
    """Copies between host and device, and the order of work on two streams."""

    def own(self) -> AbstractContextManager[Any]:
        """Within it, the sync's own stream is current."""
        ...

    def record(self) -> Any:
        """An event that happens once the current stream has done all its work so far."""
        ...

    def wait(self, event: Any) -> None:
        """Have the current stream's further work begin after the event. The host does not wait."""
        ...

    def wait_on_host(self, event: Any) -> None:
        """Return once the event has happened."""
        ...

    def upload(self, data: torch.Tensor) -> torch.Tensor:
        """Host bytes on the device, by one copy on the current stream. May be `data` itself: only read it."""
        ...

    def download(self, data: torch.Tensor) -> torch.Tensor:
        """Device bytes on the host, by one copy on the current stream; valid after an event recorded behind it."""
        ...

    def keep(self, buffer: torch.Tensor) -> None:
        """Do not reuse a freed buffer's memory before the current stream has done all its work so far."""
        ...


def streams_for(device: torch.device) -> Streams:
    return CudaStreams(device) if device.type == "cuda" else HostStreams()


class HostStreams:
    """See `Streams`."""

    def own(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def record(self) -> Any:
        return None

    def wait(self, event: Any) -> None:
        return None

    def wait_on_host(self, event: Any) -> None:
        return None

    def upload(self, data: torch.Tensor) -> torch.Tensor:
        return data

    def download(self, data: torch.Tensor) -> torch.Tensor:
        return data

    def keep(self, buffer: torch.Tensor) -> None:
        return None


class CudaStreams:
    """See `Streams`. PyTorch keeps the page-locked memory of finished copies for the next ones."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._own = device, torch.cuda.Stream(device)

    def own(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._own)  # also makes its GPU the current one, which is the first in a new thread

    def record(self) -> Any:
        event = torch.cuda.Event(blocking=True)  # `wait_on_host` sleeps, and leaves its core to the engine
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def wait_on_host(self, event: Any) -> None:
        event.synchronize()

    def upload(self, data: torch.Tensor) -> torch.Tensor:
        return _page_locked(data).copy_(data).to(self._device, non_blocking=True)

    def download(self, data: torch.Tensor) -> torch.Tensor:
        return _page_locked(data).copy_(data, non_blocking=True)

    def keep(self, buffer: torch.Tensor) -> None:
        buffer.record_stream(torch.cuda.current_stream(self._device))


def _page_locked(like: torch.Tensor) -> torch.Tensor:
    """The only memory that a GPU copies from and to while the host does something else."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
