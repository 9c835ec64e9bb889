"""Vision models: image processor, model inputs, positions, vision tower, and Qwen3-VL."""
