"""Triton kernels: one module per op, found by its name, with the fields of csrc/ops.h as arguments.

`gae` has none: its caller has it on the CPU.
"""
