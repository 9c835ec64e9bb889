"""Images before a decoder: processor, inputs, positions, and the vision tower."""
