"""CUDA launches with a workspace; a stand-in for the native side on the host, then CUDA graphs."""

from __future__ import annotations

import ctypes
import math
from types import SimpleNamespace

import pytest
import torch

from spo_kernels import (
    cutpoint_segments,
    segment_advantages,
    tree_advantages,
    tree_stats,
    tree_values,
)
from spo_kernels.testing import DEVICE, FAST
from spo_kernels.workspace import run_checked

on_gpu = pytest.mark.skipif(DEVICE.type != "cuda" or FAST != "cuda", reason="needs a GPU")


@pytest.mark.parametrize(
    "kernel, left, want",
    [("tree", 0, True), ("tree", -1, False), ("segments", 0, 0), ("segments", 7, 7)]
    + [("segments", -1, -1), ("segment_advantages", 0, True), ("segment_advantages", -1, False)],
)
def test_the_result_is_what_the_kernel_leaves_in_its_workspace(kernel, left, want):
    args = SimpleNamespace()

    def launch(given):
        assert given is args
        ctypes.memset(given.workspace, 0x55, 300)
        ctypes.c_int64.from_address(given.workspace).value = left

    native = SimpleNamespace(**{f"{kernel}_workspace": lambda given: 300, f"{kernel}_cuda": launch})
    result = run_checked(native, kernel, args, torch.device("cpu"))
    assert result == want and type(result) is type(want)


def capture(run):
    """A CUDA graph of `run`, and what `run` returns in it."""
    run()  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@on_gpu
def test_a_graph_gives_the_values_and_nan_where_the_forest_is_malformed():
    parent = torch.tensor([-1, 0, 0, 1, 1], dtype=torch.int32)
    rewards = torch.tensor([math.nan, math.nan, 1, 1, 0])
    in_value = torch.tensor([0, 1, 1, 1, 1], dtype=torch.bool)
    known = torch.tensor([0.75, 0.5, 1, 1, 0])

    def run():
        values = tree_values(parent, rewards, in_value, backend="cuda")
        counts, variances = tree_stats(parent, known, in_value, backend="cuda")
        plain = tree_advantages(parent, known, in_value, backend="cuda")
        scaled = tree_advantages(parent, known, in_value, scale="std", backend="cuda")
        return values, variances, plain, scaled, counts

    graph, (values, variances, plain, scaled, counts) = capture(run)
    graph.replay()
    assert values.tolist() == known.tolist() and counts.tolist() == [2, 2, 0, 0, 0]
    assert variances.tolist()[:2] == [0.0625, 0.25]
    assert plain.tolist() == [0, -0.25, 0.25, 0.5, -0.5]
    torch.testing.assert_close(scaled, torch.tensor([0.0, -1, 1, 1, -1]))
    parent[4] = 4
    graph.replay()
    assert all(x.isnan().all() for x in (values, variances, plain, scaled))
    assert counts.tolist() == [-1] * 5
    parent[4] = 1
    rewards[0] = 1  # above counted children
    graph.replay()
    assert values.isnan().all() and plain.tolist() == [0, -0.25, 0.25, 0.5, -0.5]


@on_gpu
def test_a_graph_takes_segment_advantages_but_not_the_cut():
    values = torch.tensor([0.25, 0.5, 1.0])
    cu_segments, cu_seq_segments = torch.tensor([0, 2, 3]), torch.tensor([0, 2])
    graph, out = capture(
        lambda: segment_advantages(values, cu_segments, cu_seq_segments, 3, backend="cuda")
    )
    graph.replay()
    assert out.tolist() == [0.25, 0.25, 0.5]
    cu_segments[2] = 4
    graph.replay()
    assert out.isnan().all()
    logprobs, cu_seqlens = torch.zeros(3), torch.tensor([0, 3])
    with pytest.raises(RuntimeError, match="number of segments depends on the data"):
        capture(lambda: cutpoint_segments(logprobs, cu_seqlens, backend="cuda"))
    assert cutpoint_segments(logprobs, cu_seqlens, backend="cuda")[0].tolist() == [0, 3]
