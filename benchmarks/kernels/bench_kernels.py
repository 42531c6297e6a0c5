"""Ours alone, for pytest-benchmark: two commits against each other, with a tool that users know.

    pytest benchmarks --benchmark-only

Rivals are compared by the scripts of this folder.
"""

from __future__ import annotations

import pytest

from benchmarks.kernels import gae, heads, logprobs, policy_loss, rivals, segments, tree

SMALL = {module.__name__.rpartition(".")[2]: module for module in (tree, segments, gae)}
HEADS = {
    "policy_loss": (policy_loss, rivals.policy_loss),
    "logprobs": (logprobs, rivals.weighted_sum),
}


def cases(modules) -> list:
    return [
        pytest.param(name, case, id=f"{name}: {case.name}")
        for name, module in modules.items()
        for case in module.cases("cpu", False)
    ]


@pytest.mark.parametrize(("name", "case"), cases(SMALL))
def test_small(benchmark, name, case) -> None:
    benchmark.group = f"{name}: {case.name}"
    benchmark(SMALL[name].implementations(case, "cpu")["spo_kernels"].run)


@pytest.mark.parametrize(("name", "case"), cases({name: m for name, (m, _) in HEADS.items()}))
def test_head(benchmark, name, case) -> None:
    module, loss = HEADS[name]
    benchmark.group = f"{name}: {case.name}"
    ours = [*heads.ours(name, "cpu", module.ours)]
    benchmark(heads.checked(case, "cpu", loss, ours)[heads.OURS].run)
