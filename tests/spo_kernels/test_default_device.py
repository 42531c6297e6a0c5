"""`torch.set_default_device` changes no op: what one makes lies where its arguments do."""

import pytest
import torch
from kernel_cases import on_cpu_tensors
from torch import tensor

import spo_kernels as k
from spo_kernels.testing import loss_inputs

pytestmark = on_cpu_tensors


def leaf(x):
    return x.clone().requires_grad_()


def arguments(inputs):
    return inputs.token_ids, inputs.old_logprobs, inputs.advantages


def loss(inputs, **options):
    logits = leaf(inputs.logits)
    out = k.masked_ppo_loss(logits, *arguments(inputs), entropy=True, metrics=True, **options)
    out.loss.backward()
    return out.loss, out.logprobs, out.entropy, out.num_kept, out.clipfrac, logits.grad


def head(inputs, dtype, **options):
    hidden, weight = leaf(inputs.logits.to(dtype)), leaf(torch.eye(23, 23, device="cpu").to(dtype))
    index = inputs.token_ids % 7
    shared = {"hidden_index": index, "bias": torch.zeros(23, device="cpu"), **options}
    out = k.linear_masked_ppo_loss(hidden, weight, *arguments(inputs), **shared)
    logprobs = k.linear_token_logprobs(hidden, weight, inputs.token_ids, **shared)
    (out.loss + logprobs.sum()).backward()
    return out.loss, logprobs, hidden.grad, weight.grad


def objective(inputs):
    logprobs = leaf(inputs.old_logprobs - 0.1)
    out = k.policy_objective(logprobs, inputs.old_logprobs, inputs.advantages)
    out.loss.backward()
    return out.loss, logprobs.grad


def logprobs(inputs, dtype):
    logits = leaf(inputs.logits.to(dtype))
    found = k.token_logprobs(logits, inputs.token_ids, entropy=True)
    sum(x.sum() for x in found).backward()
    return *found, logits.grad


CASES = {
    "loss": loss,
    "loss, no mask": lambda x: loss(x, prob_threshold=None, temperature=0.7),
    "loss, KL": lambda x: loss(x, ref_logprobs=x.ref_logprobs, kl_coef=0.1),
    "loss, reference": lambda x: loss(x, backend="reference"),
    "head": lambda x: head(x, torch.float32),
    "head, bf16": lambda x: head(x, torch.bfloat16),
    "head, fp16": lambda x: head(x, torch.float16),
    "head, chunks": lambda x: head(x, torch.float32, memory_budget=400),
    "head, invariant": lambda x: head(x, torch.float32, batch_invariant=True),
    "objective": objective,
    "logprobs": lambda x: logprobs(x, torch.float32),
    "logprobs, fp16": lambda x: logprobs(x, torch.float16),
    "segments": lambda x: k.cutpoint_segments(
        x.old_logprobs, tensor([0, 4, 19], device="cpu"), 0.9, 2
    ),
    "tree": lambda x: k.tree_values(
        tensor([-1, 0, 0, 1], dtype=torch.int32, device="cpu"),
        tensor([float("nan"), float("nan"), 1.0, 0.0], device="cpu"),
        torch.ones(4, dtype=torch.bool, device="cpu"),
    ),
    "gae": lambda x: k.gae(
        x.advantages, x.old_logprobs, tensor([0, 4, 19], device="cpu"), gamma=0.9, lam=0.8
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_op_under_another_default_device(case):
    inputs = loss_inputs(19, 23, device="cpu")
    expected = CASES[case](inputs)
    with torch.device("meta"):
        found = CASES[case](inputs)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
