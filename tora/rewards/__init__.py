"""Reward functions, named in a config as `tora.rewards.math_answer`, and the code that calls them."""

from tora.rewards.classifier import reward_model
from tora.rewards.functions import answer_tag, format, length, math_answer, overlong
from tora.rewards.judge import llm_judge
from tora.rewards.numeric import last_number

__all__ = ["answer_tag", "format", "last_number", "length", "llm_judge", "math_answer", "overlong", "reward_model"]
