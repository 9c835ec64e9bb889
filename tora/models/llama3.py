"""Llama 3, 3.1 and 3.2 (text): no q/k norms, biases by config.json."""

from tora.models.family import ModelFamily

FAMILY = ModelFamily(name="llama3", model_type="llama", qk_norm=False, qkv_bias=None, output_bias=None)
