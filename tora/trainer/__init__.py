"""Runs from Python: `GRPOTrainer` and `GRPOConfig`, with TRL's argument names."""
