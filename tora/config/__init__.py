"""The config of a run: its schema, and how YAML becomes it. Nothing here imports torch."""
