"""cutpoint_segments and segment_advantages: the edge cases by hand, then random packs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import examples, needs_fast, slow_if_interpreted

from spo_kernels import cutpoint_segments, segment_advantages
from spo_kernels.testing import DEVICE, FAST

OP = "segments"
SURE, UNSURE = math.log(0.95), math.log(0.5)  # on either side of the default threshold


def pack(sequences: list[str]):
    """Logprobs and offsets of sequences spelled with "x" for a cutpoint and "." for any other."""
    logprobs = [UNSURE if token == "x" else SURE for tokens in sequences for token in tokens]
    lengths = torch.tensor([0] + [len(tokens) for tokens in sequences])
    return torch.tensor(logprobs, dtype=torch.float32), lengths.cumsum(0)


def cut(sequences: list[str], interval: int, backend: str | None = None) -> list[list[str]]:
    """The segments of every sequence, spelled."""
    cu_segments, cu_seq_segments = cutpoint_segments(
        *pack(sequences), 0.9, interval, backend=backend
    )
    assert cu_segments.dtype == cu_seq_segments.dtype == torch.int64
    text, offsets, of_sequence = "".join(sequences), cu_segments.tolist(), cu_seq_segments.tolist()
    spelled = [text[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert offsets[0] == 0 and offsets[-1] == len(text)
    assert of_sequence[0] == 0 and of_sequence[-1] == len(spelled)
    return [spelled[a:b] for a, b in zip(of_sequence[:-1], of_sequence[1:], strict=True)]


@pytest.mark.parametrize(
    "tokens, interval, want",
    [
        ("....", 2, ["...."]),  # no cutpoint: one segment
        ("..x.x.x.", 2, ["..", "x.x.", "x."]),  # the lead has no cutpoint, the last fewer than 2
        ("x.x.x.", 2, ["x.x.", "x."]),  # first token a cutpoint: no empty segment before it
        ("xxxx", 1, ["x", "x", "x", "x"]),
        ("xxxx", 2, ["xx", "xx"]),
        ("xxxx", 9, ["xxxx"]),
        (".xxxx", 9, [".", "xxxx"]),
        ("x", 5, ["x"]),
        (".", 5, ["."]),
        ("...x", 5, ["...", "x"]),  # the last token
        ("", 5, []),
    ],
)
def test_one_sequence(backend, tokens, interval, want):
    assert cut([tokens], interval, backend) == [want]


def test_counting_starts_anew_in_every_sequence(backend):
    sequences = ["", ".x", "x.xx", "", "x", "..", ""]
    want = [[], [".", "x"], ["x.x", "x"], [], ["x"], [".."], []]
    assert cut(sequences, 2, backend) == want
    assert cut([], 2, backend) == []
    assert cut(["", ""], 2, backend) == [[], []]


def test_threshold_is_strict_and_at_the_precision_of_the_logprobs(backend):
    for prob in (0.3, 0.5, 0.9, 0.95):  # fp32(log p) lies above log p for some, below for others
        edge = torch.tensor([0.0, math.log(prob), 0.0])
        below = torch.nextafter(edge, torch.tensor(-math.inf))
        cu_seqlens = torch.tensor([0, 3])
        assert cutpoint_segments(edge, cu_seqlens, prob, 1, backend=backend)[0].tolist() == [0, 3]
        edge[1] = below[1]
        got = cutpoint_segments(edge, cu_seqlens, prob, 1, backend=backend)[0]
        assert got.tolist() == [0, 1, 3]
    # At 1 every token that was not certain is a cutpoint; -inf is one as well.
    got = cutpoint_segments(
        torch.tensor([0.0, -1e-30, -math.inf]), cu_seqlens, 1.0, 1, backend=backend
    )
    assert got[0].tolist() == [0, 1, 2, 3]


def test_fp64_and_int32(backend):
    logprobs, cu_seqlens = pack(["..x.", "x"])
    want = cutpoint_segments(logprobs, cu_seqlens, backend=backend)
    assert want[0].tolist() == [0, 2, 4, 5]
    got = cutpoint_segments(logprobs, cu_seqlens.int(), backend=backend)
    assert all(g.dtype == torch.int64 and torch.equal(g, w) for g, w in zip(got, want, strict=True))
    got = cutpoint_segments(logprobs.double(), cu_seqlens)  # on the reference
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    exact = torch.tensor([0.0, math.log(0.9) - 1e-12], dtype=torch.float64)
    assert cutpoint_segments(exact, torch.tensor([0, 2]))[0].tolist() == [0, 1, 2]


def spell(tokens: str, interval: int) -> list[str]:
    segments, passed = [], 0
    for i, token in enumerate(tokens):
        if i == 0 or (token == "x" and passed % interval == 0):
            segments.append("")
        passed += token == "x"
        segments[-1] += token
    return segments


@settings(max_examples=examples(200), deadline=None)
@given(
    sequences=st.lists(st.text("x.", max_size=30), max_size=8),
    interval=st.integers(1, 7) | st.just(10**12),
)
def test_random_packs_against_plain_python(backend, sequences, interval):
    assert cut(sequences, interval, backend) == [spell(tokens, interval) for tokens in sequences]


@needs_fast(OP)
@pytest.mark.parametrize(
    "tokens, seqs", [(9000, 4), pytest.param(1_000_000, 1000, marks=slow_if_interpreted)]
)
def test_large_packs(tokens, seqs):
    generator = torch.Generator(DEVICE).manual_seed(0)
    logprobs = torch.rand(tokens, generator=generator).log()
    cu_seqlens = torch.randint(0, tokens + 1, (seqs - 1,), generator=generator).sort().values
    cu_seqlens = torch.cat([torch.tensor([0]), cu_seqlens, torch.tensor([tokens])])
    got = cutpoint_segments(logprobs, cu_seqlens, 0.2, 5, backend=FAST)
    want = cutpoint_segments(logprobs, cu_seqlens, 0.2, 5, backend="reference")
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    # A fifth of the tokens, five a segment.
    assert 0.039 * tokens < got[0].numel() < 0.043 * tokens

    values = torch.rand(got[0].numel() + seqs - 1, generator=generator)
    results = [segment_advantages(values, *got, backend=b) for b in (FAST, "reference")]
    assert torch.equal(*results) and results[0].shape == (tokens,)


@pytest.mark.parametrize(
    "cu_seqlens, sentence",
    [
        ([0, 3], "cu_seqlens: expected offsets from 0 to 4, found 0 to 3"),
        ([1, 4], "cu_seqlens: expected offsets from 0 to 4, found 1 to 4"),
        ([0, 5], "cu_seqlens: expected offsets from 0 to 4, found 0 to 5"),
        ([0], "cu_seqlens: expected offsets from 0 to 4, found 0 to 0"),
        ([0, 3, 2, 4], "cu_seqlens: expected no decrease, found 3 then 2 at 1"),
        ([0, 10**9, 4], "cu_seqlens: expected no decrease, found 1000000000 then 4 at 1"),
        ([0, -1, 4], "cu_seqlens: expected no decrease, found 0 then -1 at 0"),
        ([], "cu_seqlens: expected at least 1 entry, found none"),
    ],
)
def test_malformed_offsets(backend, cu_seqlens, sentence):
    with pytest.raises(ValueError, match=sentence):
        cutpoint_segments(
            torch.zeros(4), torch.tensor(cu_seqlens, dtype=torch.int64), backend=backend
        )


def test_bad_cutpoint_arguments(backend):
    logprobs, cu_seqlens = pack(["..x"])
    with pytest.raises(ValueError, match=r"prob_threshold: expected \(0, 1\], found 0"):
        cutpoint_segments(logprobs, cu_seqlens, 0.0, 5, backend=backend)
    with pytest.raises(ValueError, match=r"prob_threshold: expected \(0, 1\], found 1.5"):
        cutpoint_segments(logprobs, cu_seqlens, 1.5, 5, backend=backend)
    with pytest.raises(
        ValueError, match="interval: expected a positive number of cutpoints, found 0"
    ):
        cutpoint_segments(logprobs, cu_seqlens, 0.9, 0, backend=backend)
    with pytest.raises(TypeError, match="cu_seqlens: expected int32 or int64, found float32"):
        cutpoint_segments(logprobs, cu_seqlens.float(), backend=backend)
    with pytest.raises(TypeError, match="logprobs: expected float32 or float64, found float16"):
        cutpoint_segments(logprobs.half(), cu_seqlens, backend=backend)
    with pytest.raises(ValueError, match=r"logprobs: expected a 1-D tensor, found shape \(1, 3\)"):
        cutpoint_segments(logprobs[None], cu_seqlens, backend=backend)
    logprobs[1] = math.nan
    with pytest.raises(ValueError, match="logprobs: expected no NaN, found NaN at 1"):
        cutpoint_segments(logprobs, cu_seqlens, backend=backend)


# Sequence 0: "ab" and "c" with values 0.25, 0.5, 1; sequence 1 is empty with 7; 2: "def" with 1, 0.
VALUES = [0.25, 0.5, 1.0, 7.0, 1.0, 0.0]
CU_SEGMENTS, CU_SEQ_SEGMENTS = [0, 2, 3, 6], [0, 2, 2, 3]


def test_segment_advantages(backend):
    values, cu_segments = torch.tensor(VALUES), torch.tensor(CU_SEGMENTS)
    cu_seq_segments = torch.tensor(CU_SEQ_SEGMENTS)
    want = [0.25, 0.25, 0.5, -1, -1, -1]
    got = segment_advantages(values, cu_segments, cu_seq_segments, backend=backend)
    assert got.tolist() == want and got.dtype == torch.float32
    got = segment_advantages(values, cu_segments.int(), cu_seq_segments.int(), 6, backend=backend)
    assert got.tolist() == want
    strided = values.repeat_interleave(2)[::2]
    got = segment_advantages(strided, cu_segments, cu_seq_segments, backend=backend)
    assert got.tolist() == want
    got = segment_advantages(values.double(), cu_segments, cu_seq_segments)
    assert got.tolist() == want and got.dtype == torch.float64
    values.requires_grad_()
    got = segment_advantages(values, cu_segments, cu_seq_segments, backend=backend)
    assert not got.requires_grad
    values = torch.tensor([math.nan, *VALUES[1:]])  # an unknown value reaches its own segment only
    got = segment_advantages(values, cu_segments, cu_seq_segments, backend=backend)
    assert got.isnan().tolist() == [True, True, False, False, False, False]


def test_segment_advantages_of_nothing(backend):
    zero = torch.tensor([0])
    assert segment_advantages(torch.zeros(0), zero, zero, backend=backend).shape == (0,)
    got = segment_advantages(torch.ones(2), zero, torch.tensor([0, 0, 0]), backend=backend)
    assert got.shape == (0,)


def test_cut_then_value(backend):
    logprobs, cu_seqlens = pack([".x.x", "", "x"])
    cu_segments, cu_seq_segments = cutpoint_segments(logprobs, cu_seqlens, 0.9, 1, backend=backend)
    values = torch.tensor([0.5, 0.25, 0.75, 1.0, 9.0, 0.0, 1.0])
    got = segment_advantages(values, cu_segments, cu_seq_segments, backend=backend)
    assert got.tolist() == [-0.25, 0.5, 0.5, 0.25, 1.0]


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"num_tokens": 7}, "cu_segments: expected offsets from 0 to 7, found 0 to 6"),
        ({"num_tokens": -1}, "num_tokens: expected 0 or more, found -1"),
        ({"cu_segments": [0, 3, 2, 6]}, "cu_segments: expected no decrease, found 3 then 2 at 1"),
        ({"cu_segments": [0, 2, 3, -6]}, "num_tokens: expected 0 or more, found -6"),
        ({"cu_seq_segments": [0, 2, 1, 3]}, "cu_seq_segments: .* decrease, found 2 then 1"),
        ({"cu_seq_segments": [0, 2, 2, 2]}, "cu_seq_segments: .* from 0 to 3, found 0 to 2"),
        ({"values": VALUES[1:]}, r"values: expected M \+ B = 6 entries, found 5"),
        ({"cu_segments": []}, "cu_segments: expected at least 1 entry, found none"),
    ],
)
def test_malformed_segments(backend, change, sentence):
    args = {"values": VALUES, "cu_segments": CU_SEGMENTS, "cu_seq_segments": CU_SEQ_SEGMENTS}
    args |= change
    num_tokens = args.pop("num_tokens", None)
    dtypes = {"values": torch.float32}
    tensors = {k: torch.tensor(v, dtype=dtypes.get(k, torch.int64)) for k, v in args.items()}
    with pytest.raises(ValueError, match=sentence):
        segment_advantages(**tensors, num_tokens=num_tokens, backend=backend)


def test_opcheck(backend):
    logprobs, cu_seqlens = pack(["..x.x", "", "x"])
    ops = torch.ops.spo_kernels
    torch.library.opcheck(ops.cutpoint_segments, (logprobs, cu_seqlens, 0.9, 1, backend))
    args = (torch.tensor(VALUES), torch.tensor(CU_SEGMENTS), torch.tensor(CU_SEQ_SEGMENTS))
    torch.library.opcheck(ops.segment_advantages, (*args, 6, backend))


def test_compile_without_graph_breaks(backend):
    def advantages(logprobs, cu_seqlens, values):
        cu_segments, cu_seq_segments = cutpoint_segments(
            logprobs, cu_seqlens, 0.9, 1, backend=backend
        )
        values = values[: cu_segments.numel() + cu_seq_segments.numel() - 2]
        return segment_advantages(
            values, cu_segments, cu_seq_segments, logprobs.numel(), backend=backend
        )

    compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager")
    values = torch.tensor([0.5, 0.25, 0.75, 1.0, 9.0, 0.0, 1.0])
    got = compiled(*pack([".x.x", "", "x"]), values)
    assert got.tolist() == [-0.25, 0.5, 0.5, 0.25, 1.0]
