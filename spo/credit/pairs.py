"""DPO and DPO-Positive: pairs of a right and a wrong response to one prompt.

A pair's loss reads the sums of its two responses' logprobs, and those may lie in different packs
or on different ranks. So a step first scores its responses without a graph; the derivative of the
loss by each sum is then the credit of that response, and the gradient of

    -sum_t credit_t * logprob_t

is that of the pair loss. No pack needs to hold both responses.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.records import Forest


def pair_nodes(forest: Forest, credit: Tensor) -> Tensor:
    """(P, 2) int64, nodes (right, wrong): those of positive and of negative credit of each prompt,
    in the order of sampling. Raises ValueError if their numbers differ.
    """
    right, wrong = (torch.nonzero(mark)[:, 0] for mark in (credit > 0, credit < 0))
    trees = [forest.prompt[nodes] for nodes in (right, wrong)]
    if not torch.equal(*trees):
        raise ValueError("pairs: a prompt has unequal numbers of right and wrong responses")
    return torch.stack([right, wrong], dim=1)


def node_sums(forest: Forest, token_logprobs: Tensor) -> Tensor:
    """(S,) fp64, the sum of (T,) logprobs over the tokens of every node."""
    running = torch.cat([torch.zeros(1, dtype=torch.float64), token_logprobs.double().cumsum(0)])
    return running[forest.cu_tokens].diff()


def pair_loss(
    log_ratios: Tensor,  # (P, 2), log pi - log pi_ref of the right and of the wrong response
    *,
    beta: float,
    positive: float = 0.0,
) -> Tensor:  # (P,)
    """DPO: -log sigmoid(beta (d_right - d_wrong - positive * max(0, -d_right))).

    `positive` > 0 is DPO-Positive: it also keeps the right response from becoming less likely than
    it is under the reference.
    """
    right, wrong = log_ratios.unbind(1)
    return -logsigmoid(beta * (right - wrong - positive * (-right).clamp(min=0)))


def pair_credit(
    forest: Forest,
    pairs: Tensor,  # (P, 2) int64 nodes
    token_logprobs: Tensor,  # (T,) fp32 of the policy, read on the pairs' tokens alone
    ref_token_logprobs: Tensor,  # (T,) fp32 of the reference
    *,
    beta: float,
    positive: float,
) -> tuple[Tensor, dict[str, float]]:  # (S,) fp32, -d(sum of pair losses) / d(summed logprobs)
    """Credit of every node in a pair, 0 elsewhere, and the figures of the pairs."""
    difference = token_logprobs - ref_token_logprobs
    ratios = node_sums(forest, difference)[pairs].requires_grad_()
    losses = pair_loss(ratios, beta=beta, positive=positive)
    (gradient,) = torch.autograd.grad(losses.sum(), ratios)
    credit = torch.zeros(forest.num_nodes)
    credit[pairs] = -gradient.float()
    right, wrong = ratios.detach().unbind(1)
    figures = {
        "pairs": float(len(pairs)),
        "pair_loss": float(losses.detach().mean()),
        "pair_accuracy": float((right > wrong).double().mean()),
        "pair_margin": float(beta * (right - wrong).mean()),
    }
    return credit, figures
