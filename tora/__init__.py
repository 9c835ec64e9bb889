"""Torchtune-LoRA for RL: GRPO that trains an adapter, synchronously or asynchronously."""

from tora import compat

compat.install()
compat.quieten()
