"""Triton kernels: one module per op, found by its name, with the fields of csrc/ops.h as arguments.

Only the ops that sweep a vocabulary are here. `segments`, `tree` and `gae` follow chains of tokens
or nodes of a few bytes each: they have no wide rows, and a program per chain would wait for memory.
"""
