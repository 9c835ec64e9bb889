"""From groups of rollouts to packed micro-batches."""
