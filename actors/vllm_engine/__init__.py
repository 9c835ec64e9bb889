"""Generation with vLLM, whose adapters change between two of its steps."""
