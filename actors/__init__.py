"""The rollout side: engines, workers and the pool."""

import tora  # noqa: F401  (installs the import fixes first)
