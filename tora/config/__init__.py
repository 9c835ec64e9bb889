"""The config of a run: its schema, and the way from YAML to it. Nothing here imports torch."""
