"""LoRA and DoRA: the layer, its injection, and the wire and PEFT formats."""
