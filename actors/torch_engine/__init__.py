"""Generation on the learner's own modules, without vLLM."""
