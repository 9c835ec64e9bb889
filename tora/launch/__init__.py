"""Assembles a run. The only folder that knows both the rollout side and the learner."""
