"""The memory that a run needs, from its config and its model's config.json alone: no weights, no GPU."""
