"""What a process of vLLM's imports before vLLM itself: without the import fixes of `tora.compat` vLLM does not load."""

import tora  # noqa: F401
