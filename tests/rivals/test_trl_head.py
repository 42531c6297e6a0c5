"""TRL's head function with and without `patch_trl_head`, in TRL's own environment."""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch

from spo_kernels.integrations import patch_trl_head

utils = pytest.importorskip("trl.trainer.utils")

N, V, D, CHUNK = 37, 101, 24, 64


def problem(dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = draw(N, D).requires_grad_(), (draw(V, D) / 3).detach().requires_grad_()
    offsets = draw(V).requires_grad_() if bias else None
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, weight, offsets, targets


def run(inputs, temperature=0.7, outputs=("log_probs", "entropy"), cap=None, scale=1.0, seed=1):
    """All outputs of TRL's function, and the gradients of a random sum of the first two."""
    hidden, weight, bias, targets = inputs
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    for leaf in leaves:
        leaf.grad = None
    results = utils._ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, temperature, CHUNK, cap, scale, outputs
    )
    generator = torch.Generator().manual_seed(seed)
    total = sum(
        (x * torch.randn(x.shape, generator=generator)).sum() for x in results[:2] if x is not None
    )
    total.backward()
    return results, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "outputs",
    [
        ("log_probs",),
        ("log_probs", "entropy"),
        ("log_probs", "entropy", "is_top1"),
        ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ],
)
def test_every_output_and_gradient_is_trls(bias, outputs):
    inputs = problem(bias=bias)
    want, want_grads = run(inputs, outputs=outputs)
    with patch_trl_head():
        got, grads = run(inputs, outputs=outputs)
    for name, a, b in zip(("logprobs", "entropy", "square", "mean", "top"), got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
    for a, b in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap, scale", [(3.0, 1.0), (None, 0.25), (3.0, 0.5)])
def test_soft_caps_and_scales_are_trls(cap, scale):
    inputs = problem()
    want, want_grads = run(inputs, cap=cap, scale=scale)
    with patch_trl_head():
        got, grads = run(inputs, cap=cap, scale=scale)
    for a, b in zip((*got[:2], *grads), (*want[:2], *want_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_bf16_is_nearer_to_exact_numbers_than_trls():
    """TRL rounds the logits to bf16, `linear_token_logprobs` does not."""
    inputs = problem(torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs[:3]] + [inputs[3]]
    logits = (exact[0] @ exact[1].T + exact[2]) / 0.7
    want = logits.log_softmax(-1).gather(-1, exact[3][:, None])[:, 0]
    theirs = run(inputs)[0][0]
    with patch_trl_head():
        ours = run(inputs)[0][0]
    error = float((ours.double() - want).abs().max())
    assert error < 1e-4 and error < float((theirs.double() - want).abs().max()) / 10


def test_under_autocast_it_is_a_product_of_bf16_operands():
    inputs = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16), patch_trl_head():
        ours = run(inputs)[0][0]
    rounded = (inputs[0].bfloat16().double() @ inputs[1].detach().double().T + inputs[2]) / 0.7
    want = rounded.log_softmax(-1).gather(-1, inputs[3][:, None])[:, 0]
    torch.testing.assert_close(ours.double(), want, rtol=0, atol=2e-2)
    assert ours.dtype == torch.float32


def test_no_token_at_all_is_a_zero_that_has_a_gradient():
    hidden, weight, _, targets = problem()
    with patch_trl_head():
        out = utils._ChunkedLogProbFunction.apply(hidden[:0], weight, None, targets[:0], 1.0, CHUNK)
        out[0].sum().backward()
    assert out[0].shape == (0,) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_applied_twice_it_is_refused():
    before = utils._ChunkedLogProbFunction
    for threshold in (None, 0.5):
        with patch_trl_head(threshold), pytest.raises(RuntimeError) as error:
            patch_trl_head()
        assert str(error.value) == (
            "patch_trl_head: already applied; call the Patch to undo it first"
        )
    assert utils._ChunkedLogProbFunction is before


def test_a_head_that_no_mask_reaches_warns_once():
    with patch_trl_head(prob_threshold=0.5), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():  # old logprobs and those of a reference
            utils._ChunkedLogProbFunction.apply(*problem(), 1.0, CHUNK)
        assert caught == []
        run(problem())
        run(problem())
    assert [str(w.message) for w in caught if "patch_trl_head" in str(w.message)] == [
        "patch_trl_head: prob_threshold acts in GRPOTrainer._compute_loss; this trainer has its "
        "own and trains without the mask"
    ]


def test_the_trainers_that_docs_name_are_those_that_use_the_head():
    """The callers of the function that puts TRL's chunked head on a model."""
    folder = Path(utils.__file__).parents[1]
    callers = {
        path.stem.removesuffix("_trainer")
        for path in folder.rglob("*_trainer.py")
        if re.search(r"^ +add_fused_lm_head\(", path.read_text(), re.MULTILINE)
    }
    assert callers == {"grpo", "rloo", "dpo", "kto", "sft", "async_grpo"}


def test_undo_gives_trls_function_back():
    before = utils._ChunkedLogProbFunction, utils._use_triton
    undo = patch_trl_head(prob_threshold=0.5)
    assert utils._ChunkedLogProbFunction is not before[0]
    undo()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


def test_a_head_that_zero3_splits_is_refused():
    inputs = problem()
    inputs[1].ds_id = 0
    with patch_trl_head(), pytest.raises(RuntimeError, match="found one that DeepSpeed ZeRO-3"):
        run(inputs)


class Trainer:
    """What `GRPOTrainer._compute_loss` does with the head: one call, and a loss."""

    use_adaptive_entropy = False

    def __init__(self, inputs, top_entropy_quantile=1.0):
        self.inputs, self.top_entropy_quantile = inputs, top_entropy_quantile

    def compute(self, batch):
        return utils._ChunkedLogProbFunction.apply(
            *self.inputs, 1.0, CHUNK, None, 1.0, ("log_probs", "entropy")
        )[:2]


def gradients(threshold, batch, **options):
    """Of the sum of logprobs and entropies, through the head, with the mask of `batch`."""
    from spo_kernels.integrations import trl_head

    inputs = problem()
    compute = trl_head._with_mask(lambda self, model, batch: self.compute(batch), threshold)
    with patch_trl_head():
        logprobs, entropy = compute(Trainer(inputs, **options), None, batch)
        (logprobs + entropy).sum().backward()
    return logprobs.detach(), inputs[0].grad


def test_tokens_above_the_threshold_send_no_gradient():
    inputs = problem()
    logits = inputs[0] @ inputs[1].T + inputs[2]
    log_p = logits.log_softmax(-1)
    logprobs = log_p.gather(-1, inputs[3][:, None])[:, 0]
    threshold = float(logprobs.detach().median()) + 1e-4
    total = logprobs - (log_p.exp() * log_p).sum(-1)
    total[logprobs < threshold].sum().backward()
    got, dhidden = gradients(threshold, {})
    torch.testing.assert_close(got, logprobs.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dhidden, inputs[0].grad, rtol=1e-4, atol=1e-5)
    assert (dhidden == 0).all(1).sum() == N // 2


def test_old_logprobs_decide_where_trl_has_them():
    """Dropped tokens count with their old logprob and are not projected; NaN keeps a token."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(4, 15, generator=generator) < 0.5
    mask.view(-1)[:] = False
    mask.view(-1)[torch.randperm(60, generator=generator)[:N]] = True
    old = -torch.rand(4, 15, generator=generator)
    old[~mask] = float("nan")  # padding
    threshold = math.log(0.6)
    got, dhidden = gradients(threshold, {"old_per_token_logps": old, "completion_mask": mask})
    dropped = old[mask] >= threshold
    assert 5 < dropped.sum() < N - 5
    assert torch.equal(got[dropped], old[mask][dropped])
    assert (dhidden[dropped] == 0).all() and (dhidden[~dropped] != 0).any(1).all()


def test_where_entropies_choose_tokens_all_are_projected():
    """Old logprobs still decide which tokens send a gradient."""
    inputs = problem()
    logits = inputs[0] @ inputs[1].T + inputs[2]
    log_p = logits.log_softmax(-1)
    logprobs = log_p.gather(-1, inputs[3][:, None])[:, 0]
    old = -torch.rand(1, N, generator=torch.Generator().manual_seed(3))
    kept = old[0] < math.log(0.6)
    (logprobs - (log_p.exp() * log_p).sum(-1))[kept].sum().backward()
    batch = {"old_per_token_logps": old, "completion_mask": torch.ones(1, N)}
    got, dhidden = gradients(math.log(0.6), batch, top_entropy_quantile=0.4)
    torch.testing.assert_close(got, logprobs.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dhidden, inputs[0].grad, rtol=1e-4, atol=1e-5)
    assert 5 < kept.sum() < N - 5 and (dhidden[~kept] == 0).all()


def test_old_logprobs_of_other_tokens_are_refused():
    batch = {"old_per_token_logps": torch.zeros(2, 3), "completion_mask": torch.ones(2, 3)}
    with pytest.raises(ValueError, match="expected old logprobs of the 37 tokens .* found 6"):
        gradients(-0.1, batch)
