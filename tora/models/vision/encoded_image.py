"""An encoded image file on its way between processes."""

from __future__ import annotations

import pickle
from typing import Any


class EncodedImage(bytes):
    """The bytes of an encoded image file, which pickle protocol 5 hands over beside its own stream. Ray thus copies
    them once, into its object store, where plain `bytes` are copied several times. An image that one message has twice
    is sent once."""

    stored: tuple[str, Any] | None = None
    """Where a copy of it is; see `tora.batching.stored_images`. Not sent along."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if protocol < 5:
            return EncodedImage, (bytes(self),)
        return EncodedImage, (pickle.PickleBuffer(self),)
