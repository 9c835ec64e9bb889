"""Generation with the learner's own modules, without vLLM."""
