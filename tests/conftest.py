"""What every test needs before anything else is imported."""

import os

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}.items():
    os.environ.setdefault(name, value)

import tora  # noqa: E402, F401  (its import fixes must precede transformers and peft)
