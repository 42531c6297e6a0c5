"""Calls of the ops by a backend that runs PTX, against the reference."""

import pytest
import torch
from ptx_source import NVCC

from spo_kernels import (
    cutpoint_segments,
    masked_ppo_loss,
    segment_advantages,
    token_logprobs,
    tree_advantages,
    tree_stats,
    tree_values,
)
from spo_kernels.testing import DEVICE, assert_as_good_as_torch

on_cpu_tensors = pytest.mark.skipif(DEVICE.type != "cpu", reason="PTX runs on CPU tensors")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
NAN = float("nan")
FIGURES = ("loss", "policy_loss", "kl", "clipfrac", "ratio_mean", "logprobs")


def loss_of(inputs, dtype, backend, grad=True, **options):
    """The record of a call of the policy loss, and the gradient."""
    x = inputs.logits.to(dtype, copy=True).requires_grad_(grad)
    record = masked_ppo_loss(
        x, inputs.token_ids, inputs.old_logprobs, inputs.advantages, loss_mask=inputs.loss_mask,
        ref_logprobs=inputs.ref_logprobs, **{"kl_coef": 0.1, **options}, backend=backend,
    )  # fmt: skip
    if grad:
        record.loss.backward()
    return record, x.grad


def compare_loss(backend, inputs, grad=True, **options):
    """Also with PyTorch in the same dtype. Returns what the PTX gave."""
    dtype = inputs.logits.dtype
    ways = ((backend, dtype), ("reference", dtype), ("reference", torch.float64))
    (got, dx), (same, same_dx), (oracle, oracle_dx) = (
        loss_of(inputs, kind, name, grad, **options) for name, kind in ways
    )
    assert got.num_kept == oracle.num_kept
    names = FIGURES if got.entropy is None else (*FIGURES, "entropy", "entropy_loss")
    for name in names:
        triple = [getattr(record, name).detach() for record in (got, same, oracle)]
        assert_as_good_as_torch(name, *triple, scale=1.0)
    if grad:
        assert_as_good_as_torch("dlogits", dx, same_dx, oracle_dx, scale=0.1)
    return got, dx


def compare_logprobs(backend, dtype, softcap):
    """Forward and backward, of rows of any alignment, one of them masked."""
    g = torch.Generator().manual_seed(3)
    for vocab in (7, 1031):
        logits = (torch.randn(5, vocab, generator=g) * 3).to(dtype)
        ids = torch.randint(vocab, (5,), generator=g)
        mask = torch.tensor([True, True, False, True, True])
        heat = torch.rand(5, generator=g) + 0.5
        grads = torch.randn(2, 5, generator=g) * mask
        results = []
        for name, kind in ((backend, dtype), ("reference", dtype), ("reference", torch.float64)):
            x = logits.to(kind, copy=True).requires_grad_()
            found = token_logprobs(
                x, ids, loss_mask=mask, temperature=heat, entropy=True, logit_softcap=softcap,
                backend=name,
            )  # fmt: skip
            (torch.stack(found) * grads).sum().backward()
            results.append((*(f.detach() for f in found), x.grad))
        names = ("logprobs", "entropy", "dlogits")
        for name, triple in zip(names, zip(*results, strict=True), strict=True):
            assert_as_good_as_torch(name, *triple, scale=1.0)


def both(backend, function, *args, **options):
    """What an op gives; the same from the reference."""
    found, want = (function(*args, **options, backend=name) for name in (backend, "reference"))
    torch.testing.assert_close(found, want, equal_nan=True, rtol=1e-6, atol=1e-6)
    return want


def compare_segments(backend, *sequences):
    """`sequences`: the lengths of the sequences of each call."""
    g = torch.Generator().manual_seed(4)
    for lengths in sequences:
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        logprobs = -torch.rand(sum(lengths), generator=g) * 0.3
        for interval in (1, 3):
            options = {"prob_threshold": 0.9, "interval": interval}
            bounds, seqs = both(backend, cutpoint_segments, logprobs, offsets, **options)
            values = torch.randn(bounds.numel() + seqs.numel() - 2, generator=g)
            both(backend, segment_advantages, values, bounds, seqs, sum(lengths))


def compare_trees(backend, largest):
    g = torch.Generator().manual_seed(5)
    for nodes in (1, 5, largest):
        above = (torch.rand(nodes, generator=g) * torch.arange(nodes) * 0.98).int()
        parent = torch.where(torch.rand(nodes, generator=g) < 0.05, -1, above).int()
        parent[0] = -1
        leaf = torch.ones(nodes, dtype=torch.bool)
        leaf[parent[parent >= 0].long()] = False
        rewards = torch.where(leaf, torch.rand(nodes, generator=g), NAN)
        counted = torch.ones(nodes, dtype=torch.bool)
        values = both(backend, tree_values, parent, rewards, counted)
        both(backend, tree_stats, parent, values, counted)
        for baseline in ("parent", "loo"):
            for scale in ("none", "std"):
                options = {"baseline": baseline, "scale": scale}
                both(backend, tree_advantages, parent, values, counted, **options)
