"""Environments and tools: what answers the policy between the turns of an episode. TRL's contract; see `base`."""

from tora.environments.base import get_reward as get_reward
