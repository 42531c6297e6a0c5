"""The extras of linear_token_logprobs: by hand, then against fp64 and against TRL."""

import math

import pytest
import torch
from kernel_cases import DTYPES, backends_of
from torch import tensor

from spo_kernels import TokenExtras, linear_token_logprobs
from spo_kernels.extras import NAMES
from spo_kernels.testing import DEVICE

BACKENDS = backends_of("logprobs")
FP64 = torch.float64


def make(rows, vocab, dtype=torch.float32, width=6, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g).to(dtype)
    weight = torch.randn(vocab, width, generator=g).to(dtype)
    bias = torch.randn(vocab, generator=g).to(dtype)
    return hidden, weight, bias, torch.randint(vocab, (rows,), generator=g)


def expected(hidden, weight, bias, ids, temperature=1.0, top_k=1):
    """By the formulas, in fp64."""
    z = (hidden.double() @ weight.double().T + bias.double()) / temperature
    return TokenExtras(
        is_top1=z.argmax(-1) == ids,
        log_sum_sq_probs=z.softmax(-1).square().sum(-1).log(),
        mean_logits=z.mean(-1),
        top_ids=torch.sort(z, dim=-1, descending=True, stable=True).indices[..., :top_k],
    )


def check(found, want, slack):
    assert torch.equal(found.is_top1, want.is_top1) and torch.equal(found.top_ids, want.top_ids)
    for name in ("log_sum_sq_probs", "mean_logits"):
        got, exact = getattr(found, name), getattr(want, name)
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=slack)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Logits of two rows: log 1, log 2, log 1 and log 3, log 1, log 3; the third is masked."""
    bias = torch.zeros(3)
    hidden = torch.eye(3)
    weight = tensor([[1.0, 3, 7], [2, 1, 8], [1, 3, 9]]).log()
    ids, mask = tensor([1, 2, 0]), tensor([True, True, False])
    logprobs, entropy, found = linear_token_logprobs(
        *(hidden, weight, ids),
        **{"bias": bias, "loss_mask": mask, "entropy": True, "backend": backend},
        **{"extras": NAMES, "top_k": 2},
    )
    torch.testing.assert_close(logprobs, tensor([0.5, 3 / 7, 1]).log())
    torch.testing.assert_close(entropy[0], tensor(1.5 * math.log(2)))
    assert found.is_top1.tolist() == [True, False, False]  # 0 comes before 2 in the second row
    want = [math.log(0.25 + 2 / 16), math.log(19 / 49), 0]
    torch.testing.assert_close(found.log_sum_sq_probs, tensor(want))
    want = [math.log(2) / 3, math.log(9) / 3, 0]
    torch.testing.assert_close(found.mean_logits, tensor(want))
    assert found.top_ids.tolist() == [[1, 0], [0, 2], [-1, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, FP64])
@pytest.mark.parametrize("budget", [None, 3 * 301 * 4])
@pytest.mark.parametrize("temperature", [1.0, torch.linspace(0.3, 3, 20)])
def test_against_fp64(backend, dtype, budget, temperature):
    backend = "reference" if dtype == FP64 else backend
    *arguments, ids = make(20, 301, dtype)
    hidden, weight, bias = arguments
    heat = temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature
    _, found = linear_token_logprobs(
        *(hidden, weight, ids),
        **{"bias": bias, "temperature": temperature, "memory_budget": budget},
        **{"extras": NAMES, "top_k": 7, "backend": backend},
    )
    assert found.mean_logits.dtype == (FP64 if dtype == FP64 else torch.float32)
    want = expected(hidden, weight, bias, ids, heat, 7)
    check(found, want, 1e-12 if dtype == FP64 else 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_are_of_scaled_and_capped_logits(backend):
    hidden, weight, bias, ids = make(20, 301, torch.float32)
    options = {"bias": bias, "temperature": 0.7, "extras": ["log_sum_sq_probs", "mean_logits"]}
    options |= {"logit_scale": 0.5, "logit_softcap": 2.0, "backend": backend}
    _, found = linear_token_logprobs(hidden, weight, ids, **options)
    logits = hidden.double() @ weight.double().T + bias.double()
    z = 2 * torch.tanh(logits * 0.5 / 2) / 0.7
    want = 2 * z.log_softmax(-1)
    torch.testing.assert_close(
        found.log_sum_sq_probs.double(), want.logsumexp(-1), rtol=0, atol=2e-5
    )
    torch.testing.assert_close(found.mean_logits.double(), z.mean(-1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_logits_the_first_is_the_largest(backend):
    """Also if one zero is negative, and behind any rows of one chunk."""
    g = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randint(-2, 3, (40, 3), generator=g).float()
    hidden = torch.randint(-1, 2, (50, 3), generator=g).float()
    hidden[7], hidden[8] = 0, -0.0
    for ids in (torch.zeros(50, dtype=torch.int64), torch.arange(50) % 40):
        _, found = linear_token_logprobs(
            hidden, weight, ids, extras=("top_ids", "is_top1"), top_k=40, backend=backend
        )
        want = expected(hidden, weight, torch.zeros(40), ids, top_k=40)
        assert torch.equal(found.top_ids, want.top_ids)
        assert torch.equal(found.is_top1, want.is_top1) and found.is_top1.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_offsets_and_impossible_tokens(backend, shift):
    hidden, weight, bias, ids = make(9, 50)
    bias = bias + shift
    bias[3] = -torch.inf
    logprobs, found = linear_token_logprobs(
        hidden, weight, ids, bias=bias, extras=NAMES, top_k=50, backend=backend
    )
    want = expected(hidden, weight, bias, ids, top_k=50)
    torch.testing.assert_close(
        found.log_sum_sq_probs.double(), want.log_sum_sq_probs, rtol=0, atol=4e-3
    )  # a logit of 1e4 has steps of 1e-3
    assert (found.mean_logits == -torch.inf).all() and (found.top_ids[:, -1] == 3).all()
    logits = (hidden @ weight.T + bias).double()
    exact = logits.softmax(-1).square().sum(-1).log()  # of the same fp32 logits
    torch.testing.assert_close(found.log_sum_sq_probs.double(), exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend):
    """Shapes (2, 3) and through an index; the rest is None, and the gradients stay."""
    hidden, weight, _, ids = make(6, 30)
    hidden.requires_grad_()
    plain = linear_token_logprobs(hidden, weight, ids, backend=backend)
    index = torch.arange(6)
    logprobs, found = linear_token_logprobs(
        hidden, weight, ids, hidden_index=index, extras=["is_top1"], backend=backend
    )
    assert torch.equal(plain, logprobs) and found.is_top1.shape == (6,)
    assert found.top_ids is found.mean_logits is found.log_sum_sq_probs is None
    grads = [torch.autograd.grad(x.sum(), hidden)[0] for x in (plain, logprobs)]
    torch.testing.assert_close(*grads)
    _, found = linear_token_logprobs(
        hidden.view(2, 3, 6), weight, ids.view(2, 3), extras=("top_ids",), top_k=4, backend=backend
    )
    assert found.top_ids.shape == (2, 3, 4) and not found.top_ids.requires_grad
    _, nothing = linear_token_logprobs(hidden, weight, ids, extras=(), backend=backend)
    assert nothing == TokenExtras(None, None, None, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    hidden, weight, _, ids = make(0, 5)
    _, found = linear_token_logprobs(hidden, weight, ids, extras=NAMES, backend=backend)
    assert found.top_ids.shape == (0, 1) and found.is_top1.shape == (0,)


def test_against_trl():
    """TRL's own function, where it is installed."""
    module = pytest.importorskip("trl.kernels.chunked_logprob", exc_type=ImportError)
    hidden, weight, bias, ids = make(40, 97, width=16)
    ids[::2] = (hidden @ weight.T + bias).argmax(-1)[::2]
    _, _, square, mean, top = module.ChunkedLogProbFunction.apply(
        hidden, weight, bias, ids, 0.7, 32, None, 1.0, module.OPTIONAL_OUTPUTS
    )
    _, found = linear_token_logprobs(hidden, weight, ids, bias=bias, temperature=0.7, extras=NAMES)
    assert torch.equal(found.is_top1, top) and found.is_top1.any()
    torch.testing.assert_close(found.log_sum_sq_probs, square)
    torch.testing.assert_close(found.mean_logits, mean)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"extras": "is_top1"},
            TypeError,
            "extras: expected a sequence of names, found the string",
        ),
        ({"extras": ["top1"]}, ValueError, "extras: expected names among is_top1, .* found 'top1'"),
        ({"extras": ["is_top1"], "top_k": 2}, ValueError, "top_k: expected 'top_ids' among"),
        ({"top_k": 2}, ValueError, "top_k: expected 'top_ids' among the extras"),
        ({"extras": ["top_ids"], "top_k": 0}, ValueError, "top_k: expected a number from 1 to 5"),
        ({"extras": ["top_ids"], "top_k": 6}, ValueError, "from 1 to 5, found 6"),
    ],
)
def test_errors(options, error, message):
    hidden, weight, _, ids = make(3, 5)
    with pytest.raises(error, match=message):
        linear_token_logprobs(hidden, weight, ids, **options)
