"""Forests to credit: one file a rule, and the replay buffer."""
