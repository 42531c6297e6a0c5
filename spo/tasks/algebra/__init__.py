"""Reads answers in LaTeX or plain text and compares them; `spo.tasks.algebra.same.equal` does both.

It evaluates nothing as code, and computes no number of more digits than `numbers` allows, so that
no answer takes long.
"""
