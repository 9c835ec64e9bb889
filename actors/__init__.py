"""The rollout side: engines and workers."""

import tora  # noqa: F401  (installs the import fixes first)
