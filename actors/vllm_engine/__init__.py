"""Generation with vLLM. New policy versions are installed between two of its steps."""
