"""The recipe of a run."""
