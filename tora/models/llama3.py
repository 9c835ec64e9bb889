"""Llama 3.x."""

from tora.models.family import ModelFamily

FAMILY = ModelFamily(name="llama3", model_type="llama", qk_norm=False, qkv_bias=None, output_bias=None)
