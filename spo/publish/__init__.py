"""A run's policy for others: a folder with a model card, and its upload to the hub."""
