"""Marks of a config's keys, written beside the field: `Annotated[int, Resume.FIXED]`. Bounds are in `bounds.py`."""

from __future__ import annotations

from enum import Enum


class Resume(Enum):
    """What happens if a resumed run has another value than the run that wrote the checkpoint. Keys within a section
    have the section's mark unless they have their own."""

    FIXED = "fixed"
    """The run is refused: the key defines the policy, and a checkpoint of another policy cannot be used."""
    FIXED_COMPONENT = "fixed component"
    """The run is refused if `_component_` differs. Its arguments are `APPLIED`."""
    APPLIED = "applied"
    """The change is reported and takes effect. Keys without a mark have this one."""
    FREE = "free"
    """The change takes effect and is not mentioned: it has no effect on what is learned."""
