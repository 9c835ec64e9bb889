"""A run from start to finish: training loop, checkpoints, recovery, and the canary that checks the engines."""
