"""The PTX of the policy loss's kernels, over whole calls, against the reference in fp64."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from ptx_cases import FIGURES, compare_loss, loss_of, needs_nvcc, on_cpu_tensors
from ptx_device import Device
from ptx_machine import ORDERS
from ptx_program import PtxError
from ptx_source import fields_of, ptx_of

from spo_kernels import masked_ppo_loss
from spo_kernels.policy_launch import Launch
from spo_kernels.testing import assert_as_good_as_torch, loss_inputs
from spo_kernels.tokens import prepare

pytestmark = [needs_nvcc, on_cpu_tensors]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABS = {1: (1, 7, 8, 31, 1031), 2: (7, 1031), 4: (8, 31), 8: (1, 31, 1031)}  # by cluster
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(masked_ppo_loss).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
    if name not in ("entropy", "inplace_grad", "backend")
}
EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}


@pytest.fixture
def device(monkeypatch):
    return Device().install(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cluster", VOCABS)
def test_held_rows(device, dtype, cluster):
    """A row in a cluster, down to one element; some rows are dropped, some are misaligned."""
    device.cluster = cluster
    for seed, vocab in enumerate(VOCABS[cluster]):
        inputs = loss_inputs(6, vocab, dtype, seed=seed)
        compare_loss(
            "cpu", inputs, entropy=bool(seed % 2), kl_scope="all" if seed % 3 else "masked"
        )
    assert {name.split("<")[0] for name in device.ran} == {
        "prepare_tokens",
        "policy_loss_held",
        "finish_tokens",
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_streamed_rows(device, dtype):
    """What launchers do without clusters, for a soft cap, and where no gradient is wanted."""
    device.cluster = None
    for seed, vocab in enumerate((7, 1031)):
        inputs = loss_inputs(5, vocab, dtype, seed=seed)
        compare_loss("cpu", inputs, entropy=True)
        compare_loss("cpu", inputs, entropy_coef=0.01, kl_estimator="k2")
        compare_loss("cpu", inputs, entropy_coef=0.01, logit_softcap=3.0, kl_estimator="k1")
    compare_loss("cpu", loss_inputs(5, 1031, dtype), grad=False, metrics=True)
    kinds = {name.split("<")[0] for name in device.ran}
    assert kinds >= {"policy_loss_streamed", "policy_loss_streamed_capped"}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cluster", [1, 8, None])
def test_orders(device, order, cluster):
    """No bit depends on which warp runs first or when a copy lands; the gradient may overwrite."""
    device.cluster = cluster
    inputs = loss_inputs(3, 1103 if cluster == 1 else 2603, kept=1.0, seed=9)
    record, dx = compare_loss("cpu", inputs)
    device.orders = {"policy_loss": order}
    x = inputs.logits.clone().requires_grad_()
    rows = (x * 1, inputs.token_ids, inputs.old_logprobs, inputs.advantages)
    options = {"loss_mask": inputs.loss_mask, "ref_logprobs": inputs.ref_logprobs, "kl_coef": 0.1}
    again = masked_ppo_loss(*rows, **options, inplace_grad=True, backend="cpu")
    again.loss.backward()
    for name in FIGURES:
        torch.testing.assert_close(getattr(again, name), getattr(record, name), **EXACT)
    torch.testing.assert_close(x.grad, dx, **EXACT)


@pytest.mark.parametrize("order", ["together", "backward"])
def test_beside_the_rows(device, order):
    """Prepare and finish; together over more tokens than a block takes at once."""
    device.orders = {"policy_prepare": order}
    compare_loss("cpu", loss_inputs(4500 if order == "together" else 100, 3), metrics=True)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("cluster", "softcap"), [(2, None), (None, None), (None, 3.0)])
def test_gathered_rows_and_a_narrow_gradient(device, dtype, cluster, softcap):
    """As the loss from hidden states calls them: fp32 logits of the used tokens, room for more."""
    device.cluster = cluster
    inputs, rows = loss_inputs(9, 77, seed=2), 8
    options = {"prob_threshold": 0.9, "kl_coef": 0.1, "old_logprobs": inputs.old_logprobs}
    options |= {"loss_mask": inputs.loss_mask, "ref_logprobs": inputs.ref_logprobs}
    given = {"token_ids": inputs.token_ids, "advantages": inputs.advantages, **options}
    given["logit_softcap"] = softcap
    tokens = prepare(inputs.logits, inputs.token_ids.shape, **DEFAULTS | given)
    room = {name: torch.empty(rows, dtype=torch.int64) for name in ("index", "states", "sources")}
    launch = Launch(
        "cpu", inputs.logits, 77, tokens, False, False, capacity=rows, **room, num_states=9
    )
    launch.run("prepare")
    index, used = room["index"], int(launch.counts[2])
    assert 0 < used < rows and index[used:].tolist() == [9] * (rows - used)
    logits = torch.full((rows, 77), float("nan"))
    logits[:used] = inputs.logits[index[:used]]
    dlogits = torch.empty(rows, 77, dtype=dtype)
    launch.over_rows("loss", logits, dlogits)
    launch.run("finish")
    _, want = loss_of(inputs, torch.float64, "reference", logit_softcap=softcap)
    assert want is not None
    narrow = want[index[:used]].to(dtype)
    assert_as_good_as_torch("dlogits", dlogits[:used], narrow, want[index[:used]])
    assert not dlogits[used:].any()


def test_a_bad_token_is_found(device):
    inputs = loss_inputs(4, 7, kept=1.0)
    inputs.loss_mask[:] = True
    inputs.token_ids[2] = 7
    device.readable = ("stats", "uses")  # the sums over rows that did not run are thrown away
    with pytest.raises(ValueError, match="found 7 at row 2"):
        loss_of(inputs, torch.float32, "cpu")


@pytest.mark.slow  # nvcc takes seconds for each
@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures(monkeypatch, arch):
    """sm_80 has no clusters; the PTX for sm_100 also serves what is newer."""
    device = Device(arch).install(monkeypatch)
    device.cluster = None if arch == 80 else 4
    compare_loss("cpu", loss_inputs(4, 101, torch.bfloat16, kept=1.0))


def test_the_struct_of_the_extension_has_the_same_fields():
    native = pytest.importorskip("spo_kernels._C")
    for name in ("PolicyLossArgs", "LogprobsArgs", "ScaleArgs", "TreeArgs", "SegmentsArgs"):
        fields = [row[0] for row in fields_of(name)[0]]
        assert {x for x in dir(getattr(native, name)) if x[0] != "_"} == set(fields)


# What one changed constant or one lost instruction of the held row does: a pattern, which of its
# places (None: all), the new text, blocks in a cluster, order of the warps, message.
ANNOUNCED, BARRIER = r"(expect_tx\S+ _, \S+), \S+;", r"bar.sync \t0;"
TO_RANK, ALONE = r"(mapa\S+ to, \S+), \S+;", r"(cluster.wait;[^@]*setp.eq.s32 [^@]*), 1;"
COPIED, PARITY = (
    r"(complete_tx::bytes \[\S+\], \[\S+\]), \S+,",
    r"(parity.shared::cta.b64 p, \S+), 0",
)
MUTATIONS = {
    "parity of a copy": (PARITY, 0, r"\1, 1", 1, "together", "nothing has"),
    "parity of the sums": (r"(acquire\S+ p, \S+), 0", 0, r"\1, 1", 2, "together", "nothing has"),
    "bytes of the sums": (ANNOUNCED, 0, r"\1, 16;", 2, "together", "more bytes"),
    "bytes of the sums, late": (ANNOUNCED, 0, r"\1, 16;", 2, "backward", "nothing has"),
    "bytes of a copy": (ANNOUNCED, 1, r"\1, 16;", 1, "together", "never comes"),
    "size of a copy": (COPIED, 0, r"\1, 16,", 1, "together", "never comes"),
    "rank of a store": (TO_RANK, 0, r"\1, 0;", 2, "together", "two blocks"),
    "a rank too many": (TO_RANK, 0, r"\1, 2;", 2, "together", "a rank below 2"),
    "a store alone": (ALONE, 0, r"\1, 9;", 1, "together", "illegal instruction"),
    "both ranks": (r"(mapa\S+ \w+, \S+), \S+;", None, r"\1, 1;", 2, "together", "never comes"),
    "arrivals": (r"(mbarrier.init\S+ \S+), 1", 0, r"\1, 2", 2, "together", "never comes"),
    "barrier after the start": (BARRIER, 0, "", 1, "backward", "no mbarrier"),
    "barrier before the sums": (BARRIER, 1, "", 1, "forward", "nothing has"),
    "barrier before the writes": (BARRIER, 2, "", 1, "backward", "nothing has"),
    "wait for the cluster": (r"barrier.cluster.wait;", 0, "", 2, "forward", "no mbarrier"),
    "arrival": (r"barrier.cluster.arrive.relaxed;", 0, "", 2, "together", "has not arrived"),
    "fence": (r"fence.mbarrier_init.release.cluster;", 0, "", 1, "together", "no fence"),
    "scope": (r"parity.acquire.cluster.", 0, "parity.", 2, "together", "without .acquire.cluster"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_found(monkeypatch, name):
    pattern, place, new, cluster, order, message = MUTATIONS[name]
    device = Device().install(monkeypatch)
    parts = re.split(r"(?=\.entry )", ptx_of("policy_loss"))
    (held,) = [i for i, part in enumerate(parts) if "policy_loss_heldIffE" in part.split("(")[0]]
    matches = list(re.finditer(pattern, parts[held]))
    for match in reversed(matches if place is None else matches[place : place + 1]):
        text = parts[held]
        parts[held] = text[: match.start()] + match.expand(new) + text[match.end() :]
    mutated = "".join(parts)
    assert mutated != ptx_of("policy_loss")
    device.cluster, device.orders["policy_loss"] = cluster, order
    inputs = loss_inputs(2, 1103, kept=1.0, seed=9)
    device.texts["policy_loss"] = mutated
    with pytest.raises(PtxError, match=message):
        loss_of(inputs, torch.float32, "cpu", entropy=True)


def test_a_wrong_constant_shows_in_the_numbers(monkeypatch):
    """log2(e) with one more bit set."""
    device = Device().install(monkeypatch)
    log2_e = f"0f{np.float32(math.log2(math.e)).view(np.uint32):08X}"
    mutated = ptx_of("policy_loss").replace(log2_e, log2_e[:-3] + "FFF")
    assert mutated != ptx_of("policy_loss")
    device.texts["policy_loss"] = mutated
    with pytest.raises(AssertionError, match="error"):
        compare_loss("cpu", loss_inputs(4, 31, kept=1.0, seed=9))
