"""The training side: learner, loss, optimizer, checkpoints."""

import tora  # noqa: F401  (installs the import fixes first)
