"""Triton kernels: one module per op, found by its name. None is there yet."""
