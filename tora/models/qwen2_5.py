"""Qwen2.5: q, k and v always have biases; config.json does not say so."""

from tora.models.family import ModelFamily

FAMILY = ModelFamily(name="qwen2_5", model_type="qwen2", qk_norm=False, qkv_bias=True, output_bias=False)
