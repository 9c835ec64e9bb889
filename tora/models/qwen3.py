"""Qwen3 (dense): norms on q and k."""

from tora.models.family import ModelFamily

FAMILY = ModelFamily(name="qwen3", model_type="qwen3", qk_norm=True, qkv_bias=None, output_bias=None)
