"""Reward functions, named in a config as `tora.rewards.math_answer`, and the code that calls them."""

from tora.rewards.functions import answer_tag, format, length, math_answer, overlong

__all__ = ["answer_tag", "format", "length", "math_answer", "overlong"]
