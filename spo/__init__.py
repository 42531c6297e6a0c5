"""SPO: a thin trainer for Segment Policy Optimization and its relatives, built on spo_kernels."""

__version__ = "0.1.0"
