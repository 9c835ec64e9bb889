"""The training side: learner ranks, losses, optimizer, training state, export."""

import tora  # noqa: F401  (installs its import fixes first)
