"""The Triton kernels of the logprobs, and the heads on Triton: see triton_loss_cases.py."""

import math

import pytest
import torch
from triton_loss_cases import DEVICE, DTYPES, make

from spo_kernels import linear_masked_ppo_loss, linear_token_logprobs, logprobs, token_logprobs
from spo_kernels.testing import assert_as_good_as_torch, poison

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def logprobs_and_grads(function, tensors, ids, backend, dtype=None, **options):
    """Results of a logprob function and the gradients of a weighted sum of them."""
    leaves = {k: x.to(dtype or x.dtype).clone().requires_grad_() for k, x in tensors.items()}
    results = function(**leaves, token_ids=ids, backend=backend, **options)
    results = results if isinstance(results, tuple) else (results,)
    weights = torch.linspace(-1, 2, ids.numel(), device=DEVICE)
    sum((r * (weights - k)).sum() for k, r in enumerate(results)).backward()
    return [r.detach() for r in results], {k: x.grad for k, x in leaves.items()}


def compare_logprobs(function, tensors, ids, **options):
    same, same_grads = logprobs_and_grads(function, tensors, ids, "reference", **options)
    oracle = logprobs_and_grads(function, tensors, ids, None, torch.float64, **options)
    got, grads = logprobs_and_grads(function, tensors, ids, "triton", **options)
    for name, *triple in zip(("logprobs", "entropy"), got, same, oracle[0], strict=False):
        assert_as_good_as_torch(name, *triple)
    for name, grad in grads.items():
        assert grad.dtype == tensors[name].dtype
        assert_as_good_as_torch("d" + name, grad, same_grads[name], oracle[1][name])
    return got, grads


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(0, 5), (1, 7), (9, 1003), (2, 151936)])
def test_logprobs(dtype, entropy, rows, vocab):
    inputs = make(rows, vocab, dtype)
    compare_logprobs(token_logprobs, {"logits": inputs.logits}, inputs.token_ids, entropy=entropy)


def test_logprobs_of_masked_and_impossible_tokens():
    inputs = make(12, 500)
    mask = torch.arange(12, device=DEVICE) % 3 != 0
    logits = inputs.logits + 1e4
    logits[:, 1::2] = -math.inf
    ids = inputs.token_ids // 2 * 2
    options = {"temperature": torch.linspace(0.5, 2, 12, device=DEVICE), "entropy": True}
    _, want = compare_logprobs(token_logprobs, {"logits": logits}, ids, loss_mask=mask, **options)
    dirty = {"logits": poison(logits, ~mask)}
    ids = ids.masked_fill(~mask, -100)
    got, grads = logprobs_and_grads(token_logprobs, dirty, ids, "triton", loss_mask=mask, **options)
    assert torch.equal(grads["logits"], want["logits"])
    assert (got[0][~mask] == 0).all() and (grads["logits"][~mask] == 0).all()
    assert (grads["logits"][mask] != 0).any(1).all() and (grads["logits"][:, 1::2] == 0).all()


def test_unknown_ids_are_not_read():
    inputs = make(5, 100)
    ids = inputs.token_ids.clone()
    ids[1], ids[2], ids[3] = -1, 100, 2**45
    names = ("logprobs", "row_max", "row_logsum")
    results = {name: torch.zeros(5, device=DEVICE) for name in names}
    heat = torch.ones(1, device=DEVICE)
    logprobs.run_rows(
        "logprobs", "triton", inputs.logits, ids, temperature=heat, entropy=None, **results
    )
    assert results["logprobs"].isnan().tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads(dtype):
    """The heads launch the same kernels over their own buffers, chunk by chunk."""
    rows, vocab, width = 11, 300, 6
    inputs = make(rows, vocab, kept=1.0)
    g = torch.Generator().manual_seed(0)
    sizes = {"hidden": (rows, width), "weight": (vocab, width)}
    tensors = {k: torch.randn(s, generator=g).to(dtype).to(DEVICE) for k, s in sizes.items()}

    def chunked(backend):
        return {} if backend in ("reference", None) else {"memory_budget": 4 * vocab * 4}

    def chosen(backend, **arguments):
        return linear_token_logprobs(**arguments, backend=backend, **chunked(backend))

    def loss(backend, **arguments):
        tokens = (inputs.old_logprobs, inputs.advantages)
        arguments = [arguments[name] for name in ("hidden", "weight", "token_ids")]
        return linear_masked_ppo_loss(
            *arguments, *tokens, backend=backend, **chunked(backend)
        ).loss.expand(rows)

    compare_logprobs(chosen, tensors, inputs.token_ids, entropy=True)
    compare_logprobs(loss, tensors, inputs.token_ids)
