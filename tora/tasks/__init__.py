"""Tasks: datasets, and the way from their rows to prompts. One file per task; `prompts` puts the steps together."""
