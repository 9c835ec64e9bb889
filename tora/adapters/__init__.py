"""LoRA and DoRA: layers, their injection into a model, the snapshot format, and PEFT's folder format."""
