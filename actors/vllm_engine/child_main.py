"""Main module of vLLM's child processes: applies the import fixes of `tora.compat`, without which vLLM does not
load."""

import tora  # noqa: F401
