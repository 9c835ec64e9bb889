"""Qwen3 (dense): q/k norms."""

from tora.models.family import ModelFamily

FAMILY = ModelFamily(name="qwen3", model_type="qwen3", qk_norm=True, qkv_bias=None, output_bias=None)
