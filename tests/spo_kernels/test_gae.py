"""gae: numbers worked by hand, then random packs against plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import needs_fast

from spo_kernels import gae
from spo_kernels.dispatch import choose, unavailable
from spo_kernels.testing import DEVICE, FAST

OP = "gae"
ULP = 2.0**-23


# Two tokens, none, one.
REWARDS, VALUES, CU_SEQLENS = [0.0, 1.0, 2.0], [0.5, 0.25, 1.0], [0, 2, 2, 3]


def worked(dtype=torch.float32):
    return (
        torch.tensor(REWARDS, dtype=dtype),
        torch.tensor(VALUES, dtype=dtype),
        torch.tensor(CU_SEQLENS),
    )


def test_undiscounted_is_what_is_still_to_come_minus_the_value(backend):
    advantages, returns = gae(*worked(), backend=backend)
    assert advantages.tolist() == [1 - 0.5, 1 - 0.25, 2 - 1]
    assert returns.tolist() == [1, 1, 2]
    assert advantages.dtype == returns.dtype == torch.float32


def test_discounted(backend):
    # deltas: 0 + 0.5 * 0.25 - 0.5 = -0.375, 1 - 0.25 = 0.75, 2 - 1 = 1; decay 0.25.
    advantages, returns = gae(*worked(), gamma=0.5, lam=0.5, backend=backend)
    assert advantages.tolist() == [-0.375 + 0.25 * 0.75, 0.75, 1]
    assert returns.tolist() == [0.3125, 1, 2]
    # lam = 0: the deltas themselves.
    assert gae(*worked(), gamma=0.5, lam=0.0, backend=backend)[0].tolist() == [-0.375, 0.75, 1]
    # gamma = 0: the reward at hand, nothing of what follows.
    assert gae(*worked(), gamma=0.0, backend=backend)[0].tolist() == [-0.5, 0.75, 1]


def test_bootstrap_values_stand_after_the_last_tokens(backend):
    # Last deltas 1 + 0.5 * 2 - 0.25 = 1.75 and 2 + 0.5 * 4 - 1 = 3; the empty sequence's is unused.
    bootstrap = torch.tensor([2.0, math.nan, 4.0])
    options = {"gamma": 0.5, "lam": 0.5, "bootstrap_values": bootstrap}
    advantages, returns = gae(*worked(), **options, backend=backend)
    assert advantages.tolist() == [-0.375 + 0.25 * 1.75, 1.75, 3]
    assert returns.tolist() == [0.5625, 2, 4]


def test_nothing(backend):
    for cu_seqlens in ([0], [0, 0, 0]):
        got = gae(torch.zeros(0), torch.zeros(0), torch.tensor(cu_seqlens), backend=backend)
        assert got[0].shape == got[1].shape == (0,)


def test_int32_strides_and_gradients(backend):
    rewards, values, cu_seqlens = (t.repeat_interleave(2)[::2] for t in worked())
    values.requires_grad_()
    bootstrap = torch.tensor([2.0, 0, 4.0], requires_grad=True)
    got = gae(rewards, values, cu_seqlens.int(), bootstrap_values=bootstrap, backend=backend)
    assert got[0].tolist() == [2.5, 2.75, 5] and got[1].tolist() == [3, 3, 6]
    assert not got[0].requires_grad and not got[1].requires_grad


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_other_devices_run_on_the_reference(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    rewards, values, cu_seqlens = (x.to(device) for x in worked())
    assert choose("gae", rewards) == "reference" and unavailable("gae", "cuda")
    if device == "cuda":
        advantages, returns = gae(rewards, values, cu_seqlens)
        assert advantages.device.type == returns.device.type == "cuda"
        assert advantages.tolist() == [0.5, 0.75, 1] and returns.tolist() == [1, 1, 2]


def test_fp64_runs_on_the_reference():
    got = gae(*worked(torch.float64), gamma=0.5, lam=0.5)
    assert got[0].dtype == torch.float64 and got[0].tolist() == [-0.1875, 0.75, 1]


@st.composite
def packs(draw):
    lengths = draw(st.lists(st.integers(0, 12), max_size=6))
    number = st.floats(-8, 8, width=32)
    tokens = [draw(st.lists(st.tuples(number, number), min_size=n, max_size=n)) for n in lengths]
    bootstrap = draw(st.none() | st.lists(number, min_size=len(lengths), max_size=len(lengths)))
    return tokens, bootstrap, draw(st.floats(0, 1)), draw(st.floats(0, 1))


@settings(max_examples=200, deadline=None)
@given(pack=packs())
def test_random_packs_against_plain_python(backend, pack):
    sequences, bootstrap, gamma, lam = pack
    want = []
    for i, tokens in enumerate(sequences):
        following = [value for _, value in tokens] + [bootstrap[i] if bootstrap else 0.0]
        deltas = [r + gamma * following[t + 1] - v for t, (r, v) in enumerate(tokens)]
        # The definition as a sum, not as the recursion.
        want += [
            math.fsum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:]))
            for t in range(len(tokens))
        ]
    flat = [token for tokens in sequences for token in tokens]
    rewards, values = torch.tensor(flat, dtype=torch.float32).reshape(-1, 2).unbind(1)
    cu_seqlens = torch.tensor([0] + [len(tokens) for tokens in sequences]).cumsum(0)
    if bootstrap is not None:
        bootstrap = torch.tensor(bootstrap, dtype=torch.float32)
    options = {"gamma": gamma, "lam": lam, "bootstrap_values": bootstrap}
    advantages, returns = gae(rewards, values, cu_seqlens, **options, backend=backend)
    want = torch.tensor(want, dtype=torch.float64)
    torch.testing.assert_close(advantages.double(), want, rtol=ULP, atol=1e-12)
    torch.testing.assert_close(returns.double(), want + values, rtol=ULP, atol=1e-12)


@needs_fast(OP)
def test_long_sequences_agree_with_the_reference_in_fp64():
    generator = torch.Generator(DEVICE).manual_seed(0)
    lengths = torch.tensor([0, 20_000, 0, 1, 0, 7, 9000, 0])
    total = int(lengths.sum())
    rewards = torch.randn(total, generator=generator)
    values = torch.randn(total, generator=generator)
    bootstrap = torch.randn(lengths.numel() - 1, generator=generator)
    options = {"gamma": 1.0, "lam": 0.999}
    got = gae(
        rewards, values, lengths.cumsum(0), bootstrap_values=bootstrap, backend=FAST, **options
    )
    want = gae(
        rewards.double(),
        values.double(),
        lengths.cumsum(0),
        bootstrap_values=bootstrap.double(),
        **options,
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=ULP / 2 * 1.0001, atol=1e-12)


def test_bad_arguments(backend):
    rewards, values, cu_seqlens = worked()
    with pytest.raises(ValueError, match="cu_seqlens: expected offsets from 0 to 3, found 0 to 2"):
        gae(rewards, values, cu_seqlens[:-1], backend=backend)
    with pytest.raises(ValueError, match="cu_seqlens: expected no decrease, found 9 then 2 at 1"):
        gae(rewards, values, torch.tensor([0, 9, 2, 3]), backend=backend)
    with pytest.raises(ValueError, match="cu_seqlens: expected at least 1 entry, found none"):
        gae(rewards, values, cu_seqlens[:0], backend=backend)
    with pytest.raises(ValueError, match="values: expected 3 entries, found 2"):
        gae(rewards, values[1:], cu_seqlens, backend=backend)
    with pytest.raises(TypeError, match="values: expected float32, found float64"):
        gae(rewards, values.double(), cu_seqlens, backend=backend)
    with pytest.raises(ValueError, match="bootstrap_values: expected 3 entries, found 2"):
        gae(rewards, values, cu_seqlens, bootstrap_values=values[1:], backend=backend)
    with pytest.raises(ValueError, match=r"gamma: expected a number in \[0, 1\], found 1.01"):
        gae(rewards, values, cu_seqlens, gamma=1.01, backend=backend)
    with pytest.raises(ValueError, match=r"lam: expected a number in \[0, 1\], found nan"):
        gae(rewards, values, cu_seqlens, lam=math.nan, backend=backend)


def test_opcheck(backend):
    rewards, values, cu_seqlens = worked()
    for bootstrap in (None, torch.tensor([2.0, 0.0, 4.0])):
        args = (rewards, values, cu_seqlens, bootstrap, 0.5, 0.5, backend)
        torch.library.opcheck(torch.ops.spo_kernels.gae, args)


def test_compile_without_graph_breaks(backend):
    compiled = torch.compile(gae, fullgraph=True, backend="aot_eager")
    got = compiled(*worked(), gamma=0.5, lam=0.5, backend=backend)
    assert got[0].tolist() == [-0.1875, 0.75, 1] and got[1].tolist() == [0.3125, 1, 2]
