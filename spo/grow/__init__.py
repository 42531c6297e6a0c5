"""Prompts to forests: shapes, the rollout loop, evaluation."""
