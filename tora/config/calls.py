"""Code that a config names, called in the middle of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from tora.config.components import is_own
from tora.config.schema import Component
from tora.errors import ComponentError, ToraError, raised

T = TypeVar("T")


def call(component: Component, key: str, function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, where `function` is what the component made under `key`, or a method of that.

    Raises ComponentError if it raises, with file and line. What our own components raise passes through, since that is
    a mistake of ours, and so does a lack of memory.
    """
    try:
        return function(*args)
    except (ToraError, MemoryError):
        raise
    except Exception as error:  # a user's code, or a library's with a user's arguments
        if is_own(component) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is no MemoryError
            raise
        raise ComponentError(f"{key}: {component['_component_']} raised {raised(error)}") from error
