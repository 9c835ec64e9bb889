"""Qwen2.5: biased q, k and v, whatever config.json says."""

from tora.models.family import ModelFamily

FAMILY = ModelFamily(name="qwen2_5", model_type="qwen2", qk_norm=False, qkv_bias=True, output_bias=False)
